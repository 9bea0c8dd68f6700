// fastmim::norm_pix_loss_image on the CPU: kernels/fastmim_kernels/norm_pix_loss_image.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "patches.h"
#include "pix_loss.h"

namespace fastmim {
namespace {

// Calls `work(row, pred row, target row)` for every scored patch, the target as the rule wants it.
template <typename Start>
void for_rows(const at::Tensor& pred, const at::Tensor& image, const Patches& patches, const PixLoss& rule,
              const Start& start) {
  const int64_t L = pred.size(1), width = rule.width, item = pred.element_size();
  const char* rows = bytes(pred);
  at::parallel_for(0, pred.size(0) * L, grain(width), [&](int64_t begin, int64_t end) {
    Reader read(pred.scalar_type(), width);
    PatchReader read_target(patches, image.scalar_type());
    std::vector<float> target(width);
    auto work = start();
    for (int64_t row = begin; row < end; ++row) {
      read_target(row, target.data());
      rule.prepare(target.data());
      const int64_t at = row / L * pred.stride(0) + row % L * pred.stride(1);
      work(row, read(rows + at * item, width), target.data());
    }
  });
}

at::Tensor norm_pix_loss_image(const at::Tensor& pred, const at::Tensor& image, const at::Tensor& index,
                               int64_t patch, at::ArrayRef<double> scale, at::ArrayRef<double> shift,
                               bool normalize, double eps, int64_t distance, double beta) {
  const at::Tensor places = index.contiguous();
  const Patches patches(image, places, patch, scale, shift);
  const PixLoss rule{patches.width, normalize, static_cast<float>(eps), distance, static_cast<float>(beta)};
  at::Tensor out = at::empty(pred.sizes().slice(0, 2), pred.options().dtype(at::kFloat));
  float* loss = out.mutable_data_ptr<float>();
  for_rows(pred, image, patches, rule, [&] {
    return [&](int64_t row, const float* p, const float* t) { loss[row] = rule.loss(p, t); };
  });
  return out;
}

at::Tensor norm_pix_loss_image_backward(const at::Tensor& dloss, const at::Tensor& pred, const at::Tensor& image,
                                        const at::Tensor& index, int64_t patch, at::ArrayRef<double> scale,
                                        at::ArrayRef<double> shift, bool normalize, double eps, int64_t distance,
                                        double beta) {
  const at::Tensor places = index.contiguous(), slopes = dloss.contiguous();
  const Patches patches(image, places, patch, scale, shift);
  const PixLoss rule{patches.width, normalize, static_cast<float>(eps), distance, static_cast<float>(beta)};
  const float* factor = slopes.const_data_ptr<float>();
  at::Tensor dpred = at::empty(pred.sizes(), pred.options().memory_format(at::MemoryFormat::Contiguous));
  char* rows = mutable_bytes(dpred);
  const int64_t row_bytes = rule.width * pred.element_size();
  for_rows(pred, image, patches, rule, [&] {
    return [&, writer = Writer(pred.scalar_type(), rule.width)](int64_t row, const float* p, const float* t) mutable {
      char* to = rows + row * row_bytes;
      rule.slope(p, t, factor[row], writer.begin(to));
      writer.end(to, rule.width);
    };
  });
  return dpred;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) {
  m.impl("native_norm_pix_loss_image", norm_pix_loss_image);
  m.impl("native_norm_pix_loss_image_backward", norm_pix_loss_image_backward);
}

}  // namespace fastmim
