// The rows of chosen patches of a [B, H, W, C] image of any strides: kernels/fastmim_kernels/gather_patches.py.
#pragma once

#include "rows.h"

namespace fastmim {

class Patches {
 public:
  Patches(const at::Tensor& image, const at::Tensor& index, int64_t patch, at::ArrayRef<double> scale,
          at::ArrayRef<double> shift)
      : width(patch * patch * image.size(3)),
        channels_(image.size(3)), patch_(patch), per_image_(index.size(1)), grid_w_(image.size(2) / patch),
        item_(image.element_size()), stride_b_(image.stride(0)), stride_h_(image.stride(1)),
        stride_w_(image.stride(2)), stride_c_(image.stride(3)), pixels_(bytes(image)),
        index_(index.const_data_ptr<int64_t>()), scale_(width), shift_(width) {
    for (int64_t i = 0; i < width; ++i) {  // of each value of a row, so that a row is one run of vectors
      scale_[i] = static_cast<float>(scale[i % channels_]);
      shift_[i] = shift.empty() ? 0.0f : static_cast<float>(shift[i % channels_]);
    }
  }

  // The values of patch `row` in the order of the row, as they are stored.
  template <typename T>
  void copy(int64_t row, T* to) const {
    const T* from = reinterpret_cast<const T*>(pixels_ + corner(row) * item_);
    if (stride_c_ == 1 && stride_w_ == channels_) {  // a line of the patch is one run of memory
      for (int64_t i = 0; i < patch_; ++i, from += stride_h_, to += patch_ * channels_)
        std::memcpy(to, from, patch_ * channels_ * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < patch_; ++i, from += stride_h_, to += patch_ * channels_)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t j = 0; j < patch_; ++j) to[j * channels_ + c] = from[j * stride_w_ + c * stride_c_];
  }

  // `scratch` holds `width * item` bytes and is the reader's own.
  void copy_bytes(int64_t row, char* scratch) const {
    switch (item_) {
      case 1: return copy(row, reinterpret_cast<uint8_t*>(scratch));
      case 2: return copy(row, reinterpret_cast<uint16_t*>(scratch));
      default: return copy(row, reinterpret_cast<uint32_t*>(scratch));
    }
  }

  int64_t corner(int64_t row) const {
    const int64_t cell = index_[row], y = cell / grid_w_, x = cell % grid_w_;
    return row / per_image_ * stride_b_ + y * patch_ * stride_h_ + x * patch_ * stride_w_;
  }

  int64_t item() const { return item_; }
  const float* scale() const { return scale_.data(); }
  const float* shift() const { return shift_.data(); }

  const int64_t width;

 private:
  int64_t channels_, patch_, per_image_, grid_w_, item_, stride_b_, stride_h_, stride_w_, stride_c_;
  const char* pixels_;
  const int64_t* index_;
  std::vector<float> scale_, shift_;
};

// Reads normalized rows, one thread's own.
class PatchReader {
 public:
  PatchReader(const Patches& patches, at::ScalarType dtype)
      : patches_(patches), raw_(patches.width * patches.item()), reader_(dtype, patches.width) {}

  void operator()(int64_t row, float* to) {
    patches_.copy_bytes(row, raw_.data());
    const int64_t width = patches_.width;
    const float *v = reader_(raw_.data(), width), *scale = patches_.scale(), *shift = patches_.shift();
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load(v + i) * load(scale + i) + load(shift + i));
    for (; i < width; ++i) to[i] = v[i] * scale[i] + shift[i];
  }

 private:
  const Patches& patches_;
  std::vector<char> raw_;
  Reader reader_;
};

}  // namespace fastmim
