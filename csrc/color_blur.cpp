// fastmim::color_blur on the CPU: kernels/fastmim_kernels/color_blur.py.
//
// Both axes are one loop over bytes, whose taps lie a pixel or a row apart; the ends of an axis are repeated
// ahead of each pass, so no tap is looked for outside.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace fastmim {
namespace {

constexpr int BITS = 24;  // of a weight's fraction
constexpr int64_t PASSES = 3;

struct Box {
  int64_t r;
  uint32_t inner, outer;
};

inline Words read_words(const uint8_t* at) { return bits<uint32_t>(read_bytes(at)); }

// `count` bytes, each made of those up to r + 1 taps of `step` bytes away; up to LANES - 1 more are written.
void box_filter(const uint8_t* from, uint8_t* to, int64_t count, int64_t step, const Box& box) {
  const int64_t far = (box.r + 1) * step;
  for (int64_t i = 0; i < count; i += LANES) {
    Words near{};
    for (int64_t t = -box.r * step; t < far; t += step) near += read_words(from + i + t);
    const Words ends = read_words(from + i - far) + read_words(from + i + far);
    write_bytes(to + i, bits<int32_t>((near * box.inner + ends * box.outer + (1u << (BITS - 1))) >> BITS));
  }
}

// One image at a time; keeps its buffers from one to the next. A row lies between `pad` copies of its ends.
class Blur {
 public:
  Blur(int64_t height, int64_t width, int64_t channels) : height_(height), width_(width), channels_(channels) {}

  void operator()(const uint8_t* from, const Box& box, uint8_t* to) {
    const int64_t row = width_ * channels_, ends = (box.r + 1) * channels_, above = (box.r + 1) * row;
    line_.resize(2 * (row + 2 * ends + LANES));
    column_.resize(2 * (height_ * row + 2 * above + LANES));
    uint8_t *one = line_.data() + ends, *other = one + line_.size() / 2;
    uint8_t *image = column_.data() + above, *next = image + column_.size() / 2;
    for (int64_t y = 0; y < height_; ++y) {
      std::memcpy(one, from + y * row, row);
      for (int64_t pass = 0; pass < PASSES; ++pass, std::swap(one, other)) {
        repeat_ends(one, row, channels_, box.r + 1);
        box_filter(one, other, row, channels_, box);
      }
      std::memcpy(image + y * row, one, row);
    }
    for (int64_t pass = 0; pass < PASSES; ++pass, std::swap(image, next)) {
      repeat_ends(image, height_ * row, row, box.r + 1);
      box_filter(image, next, height_ * row, row, box);
    }
    std::memcpy(to, image, height_ * row);
  }

 private:
  // The first and the last `step` of `count` bytes, `times` times before and behind them.
  static void repeat_ends(uint8_t* at, int64_t count, int64_t step, int64_t times) {
    for (int64_t t = 1; t <= times; ++t) {
      std::memcpy(at - t * step, at, step);
      std::memcpy(at + count + (t - 1) * step, at + count - step, step);
    }
  }

  int64_t height_, width_, channels_;
  std::vector<uint8_t> line_, column_;
};

at::Tensor color_blur(const at::Tensor& images, const at::Tensor& boxes, const at::Tensor& solarize) {
  const at::Tensor pixels = images.contiguous(), places = boxes.contiguous(), inverted = solarize.contiguous();
  at::Tensor out = at::empty(images.sizes(), images.options());
  if (out.numel() == 0) return out;
  const int64_t size = out.numel() / out.size(0), H = out.size(1), W = out.size(2), C = out.size(3);
  const uint8_t* from = pixels.const_data_ptr<uint8_t>();
  const int64_t* box = places.const_data_ptr<int64_t>();
  const bool* inverts = inverted.const_data_ptr<bool>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    Blur blur(H, W, C);
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* image = to + b * size;
      const Box of{box[3 * b], static_cast<uint32_t>(box[3 * b + 1]), static_cast<uint32_t>(box[3 * b + 2])};
      if (of.r < 0)
        std::memcpy(image, from + b * size, size);
      else
        blur(from + b * size, of, image);
      if (inverts[b])
        for (int64_t i = 0; i < size; ++i) image[i] = image[i] >= 128 ? 255 - image[i] : image[i];
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) { m.impl("native_color_blur", color_blur); }

}  // namespace fastmim
