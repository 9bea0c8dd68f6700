// fastmim::gather_patches on the CPU: kernels/fastmim_kernels/gather_patches.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "patches.h"

namespace fastmim {
namespace {

at::Tensor gather_patches(const at::Tensor& image, const at::Tensor& index, int64_t patch,
                          at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::ScalarType dtype) {
  const at::Tensor places = index.contiguous();
  const Patches patches(image, places, patch, scale, shift);
  at::Tensor out = at::empty({index.size(0), index.size(1), patches.width}, image.options().dtype(dtype));
  char* rows = mutable_bytes(out);
  const int64_t row_bytes = patches.width * out.element_size();
  at::parallel_for(0, places.numel(), grain(patches.width), [&](int64_t begin, int64_t end) {
    PatchReader read(patches, image.scalar_type());
    Writer writer(dtype, patches.width);
    for (int64_t row = begin; row < end; ++row) {
      read(row, writer.begin(rows + row * row_bytes));
      writer.end(rows + row * row_bytes, patches.width);
    }
  });
  return out;
}

// One task per image: patches that share pixels are added in the order of the index.
at::Tensor gather_patches_backward(const at::Tensor& dout, const at::Tensor& index, at::IntArrayRef shape,
                                   at::ScalarType dtype, int64_t patch, at::ArrayRef<double> scale) {
  const at::Tensor drows = dout.contiguous(), places = index.contiguous();
  at::Tensor dimage = at::zeros(shape, dout.options().dtype(at::kFloat));
  const Patches patches(dimage, places, patch, scale, {});
  const char* rows = bytes(drows);
  const int64_t line = patch * shape[3], step = shape[2] * shape[3], row_bytes = patches.width * drows.element_size();
  const int64_t per_image = index.size(1);
  float* pixels = dimage.mutable_data_ptr<float>();
  at::parallel_for(0, shape[0], grain(per_image * patches.width), [&](int64_t begin, int64_t end) {
    Reader read(drows.scalar_type(), patches.width);
    for (int64_t row = begin * per_image; row < end * per_image; ++row) {
      const float *dx = read(rows + row * row_bytes, patches.width), *factor = patches.scale();
      float* to = pixels + patches.corner(row);
      for (int64_t i = 0; i < patch; ++i, dx += line, to += step)  // every line has the same factors
        for (int64_t j = 0; j < line; ++j) to[j] += dx[j] * factor[j];
    }
  });
  return dimage.to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) {
  m.impl("native_gather_patches", gather_patches);
  m.impl("native_gather_patches_backward", gather_patches_backward);
}

}  // namespace fastmim
