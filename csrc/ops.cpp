// Table of contents: every C++ op, all for the CPU, none with a body here. The Python module of the same
// name holds the op's definition, checks its input and calls these; shapes and formulas are explained there.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(fastmim, m) {
  // gather_patches.cpp: scale and shift per channel make (v / 255 - mean) / std of a value
  m.def("native_gather_patches(Tensor image, Tensor index, int patch, float[] scale, float[] shift, ScalarType dtype) -> Tensor");
  m.def("native_gather_patches_backward(Tensor dout, Tensor index, int[] shape, ScalarType dtype, int patch, float[] scale) -> Tensor");

  // norm_pix_loss.cpp: distance 0 is the square, 1 the absolute value, 2 smooth L1 of width beta
  m.def("native_norm_pix_loss(Tensor pred, Tensor target, bool normalize, float eps, int distance, float beta) -> Tensor");
  m.def("native_norm_pix_loss_backward(Tensor dloss, Tensor pred, Tensor target, bool normalize, float eps, int distance, float beta, bool need_pred, bool need_target) -> (Tensor, Tensor)");

  // norm_pix_loss_image.cpp
  m.def("native_norm_pix_loss_image(Tensor pred, Tensor image, Tensor index, int patch, float[] scale, float[] shift, bool normalize, float eps, int distance, float beta) -> Tensor");
  m.def("native_norm_pix_loss_image_backward(Tensor dloss, Tensor pred, Tensor image, Tensor index, int patch, float[] scale, float[] shift, bool normalize, float eps, int distance, float beta) -> Tensor");

  // restore_tokens.cpp: mask_token and pos in fp32
  m.def("native_restore_tokens(Tensor tokens, Tensor source, Tensor mask_token, Tensor pos) -> Tensor");
  m.def("native_restore_tokens_backward(Tensor dout, Tensor source, int num_tokens, bool need_tokens, bool need_mask, bool need_pos) -> (Tensor, Tensor, Tensor)");

  // resized_crop.cpp: boxes int64 [B, 4]; a filter is known by its support: 3 Lanczos, 2 cubic, 1 triangle
  m.def("native_resized_crop(Tensor[] images, Tensor boxes, Tensor flips, int height, int width, int support) -> Tensor");

  // color_jitter.cpp: order int64 [B, 4], factors fp32 [B, 4]
  m.def("native_color_jitter(Tensor images, Tensor order, Tensor factors, Tensor gray, Tensor solarize) -> Tensor");

  // color_blur.cpp: boxes int64 [B, 3], whole pixels (-1: leave) and weights
  m.def("native_color_blur(Tensor images, Tensor boxes, Tensor solarize) -> Tensor");

  // info_nce.cpp
  m.def("native_info_nce(Tensor q, Tensor k, float temperature, int label_offset, bool normalize, Tensor? labels=None) -> (Tensor, Tensor)");
  m.def("native_info_nce_backward(Tensor dloss, Tensor q, Tensor k, Tensor lse, float temperature, int label_offset, bool normalize, bool need_q, bool need_k, Tensor? labels=None) -> (Tensor, Tensor)");

  // code_loss.cpp: student, teacher and center as in Python; loss, log-sum-exps of both, entropies
  m.def("native_code_loss(Tensor student, Tensor teacher, Tensor center, Tensor pairs, float student_temperature, float teacher_temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("native_code_loss_backward(Tensor dloss, Tensor student, Tensor teacher, Tensor center, Tensor pairs, Tensor lse_student, Tensor lse_teacher, float student_temperature, float teacher_temperature) -> Tensor");
}
