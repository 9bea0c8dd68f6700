// fastmim::color_jitter on the CPU: kernels/fastmim_kernels/color_jitter.py.
//
// An image lies in planes of bytes, one for each channel, padded to whole vectors with black; each stage passes
// over them once, in the cache. Integers below 2**24 are divided in fp32, where the cut quotient is exact.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace fastmim {
namespace {

enum Stage : int64_t { NOTHING = -1, BRIGHTNESS, CONTRAST, SATURATION, HUE };

inline Floats floats(const Ints& v) { return convert<float>(v); }
inline Ints cut(const Floats& v) { return convert<int32_t>(v); }
inline Ints quotient(const Ints& a, const Ints& b) { return cut(floats(a) / floats(b)); }
inline Ints larger(const Ints& a, const Ints& b) { return choose(a > b, a, b); }
inline Ints smaller(const Ints& a, const Ints& b) { return choose(a < b, a, b); }

inline Ints blend(const Ints& base, const Ints& x, float factor) {
  const Floats v = floats(base) + factor * floats(x - base), low = choose(v < 0, Floats(), v);
  return cut(choose(low > 255, Floats(255), low));
}

inline Ints gray_of(const Ints& r, const Ints& g, const Ints& b) { return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16; }

// Where Pillow's floats end below the multiple h of 1/255 that they are meant to reach.
inline Ints falls_short(const Ints& h) {
  const Ints low = ((h >= 1) & (h <= 31)) | ((h >= 88) & (h <= 104) & ((h & 3) == 0));
  const Ints high = ((h >= 129) & (h <= 149) & ((h & 1) == 1)) | ((h >= 153) & (h <= 209) & ((h & 3) == 1));
  return low | high | (h == 176) | (h == 184);
}

inline void shift_hue(Ints& r, Ints& g, Ints& b, int32_t shift) {
  const Ints one = 1;
  const Ints v = larger(larger(r, g), b), c = v - smaller(smaller(r, g), b);
  Ints n = choose(r == v, g - b, choose(g == v, 2 * c + b - r, 4 * c + r - g));
  n = 255 * choose(n < 0, n + 6 * c, n);
  const Ints sixths = 6 * larger(c, one);
  Ints h = quotient(n, sixths);
  h += (h * sixths == n) & falls_short(h);  // true is -1
  h = (h + shift) & 255;
  const Floats s = floats(quotient(255 * c, larger(v, one))) / 255, value = floats(v);
  const Ints i = quotient(6 * h, 255);
  const Floats f = floats(6 * h - 255 * i) / 255;
  const Ints p = cut(value * (1 - s) + 0.5f), q = cut(value * (1 - s * f) + 0.5f);
  const Ints t = cut(value * (1 - s * (1 - f)) + 0.5f);
  r = choose(i == 1, q, choose(i == 4, t, choose((i == 2) | (i == 3), p, v)));
  g = choose((i == 0) | (i == 6), t, choose(i == 3, q, choose((i == 4) | (i == 5), p, v)));
  b = choose((i <= 1) | (i == 6), p, choose(i == 2, t, choose(i == 5, q, v)));
}

// One image of C channels at a time; keeps its planes from one to the next.
template <int64_t C>
class Jitter {
 public:
  explicit Jitter(int64_t count) : count_(count), size_((count + LANES - 1) / LANES * LANES), planes_(C * size_) {}

  void operator()(const uint8_t* from, const int64_t* order, const float* factor, bool gray, bool solarize,
                  uint8_t* to) {
    uint8_t* plane = planes_.data();
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t i = 0; i < count_; ++i) plane[c * size_ + i] = from[C * i + c];
      std::fill(plane + c * size_ + count_, plane + (c + 1) * size_, 0);
    }
    for (int64_t place = 0; place < 4; ++place) stage(order[place], factor);
    if (gray) each([](Ints& r, Ints& g, Ints& b) { r = g = b = level(r, g, b); });
    if (solarize)
      for (int64_t i = 0; i < C * size_; ++i) plane[i] = plane[i] >= 128 ? 255 - plane[i] : plane[i];
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t c = 0; c < C; ++c) to[C * i + c] = plane[c * size_ + i];
  }

 private:
  static Ints level(const Ints& r, const Ints& g, const Ints& b) { return C == 1 ? r : gray_of(r, g, b); }

  template <typename F>
  void each(F change) {
    uint8_t *red = planes_.data(), *green = red + (C == 3) * size_, *blue = green + (C == 3) * size_;
    for (int64_t i = 0; i < size_; i += LANES) {
      Ints r = read_bytes(red + i), g = read_bytes(green + i), b = read_bytes(blue + i);
      change(r, g, b);
      write_bytes(red + i, r);
      if (C == 3) write_bytes(green + i, g), write_bytes(blue + i, b);
    }
  }

  int32_t mean() {
    int64_t total = 0;
    const uint8_t *red = planes_.data(), *green = red + (C == 3) * size_, *blue = green + (C == 3) * size_;
    for (int64_t begin = 0; begin < size_; begin += 1 << 20) {  // as many as 32 bits hold
      Ints sum{};
      for (int64_t i = begin; i < std::min(size_, begin + (1 << 20)); i += LANES)
        sum += level(read_bytes(red + i), read_bytes(green + i), read_bytes(blue + i));
      for (int64_t lane = 0; lane < LANES; ++lane) total += sum[lane];
    }
    return static_cast<int32_t>((2 * total + count_) / (2 * count_));
  }

  void blend_all(const Ints& base, float f) {
    for (int64_t i = 0; i < C * size_; i += LANES)
      write_bytes(planes_.data() + i, blend(base, read_bytes(planes_.data() + i), f));
  }

  void stage(int64_t which, const float* factor) {
    if (which == BRIGHTNESS) blend_all(0, factor[BRIGHTNESS]);
    if (which == CONTRAST) blend_all(mean(), factor[CONTRAST]);
    if (which == SATURATION && C == 3)
      each([f = factor[SATURATION]](Ints& r, Ints& g, Ints& b) {
        const Ints base = level(r, g, b);
        r = blend(base, r, f), g = blend(base, g, f), b = blend(base, b, f);
      });
    if (which == HUE && C == 3)
      each([shift = static_cast<int32_t>(static_cast<double>(factor[HUE]) * 255)](Ints& r, Ints& g, Ints& b) {
        shift_hue(r, g, b, shift);
      });
  }

  int64_t count_, size_;
  std::vector<uint8_t> planes_;
};

template <int64_t C>
void jitter_all(const at::Tensor& images, const int64_t* order, const float* factor, const bool* gray,
                const bool* solarize, at::Tensor& out) {
  const int64_t count = images.size(1) * images.size(2);
  const uint8_t* from = images.const_data_ptr<uint8_t>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, images.size(0), 1, [&](int64_t begin, int64_t end) {
    Jitter<C> jitter(count);
    for (int64_t b = begin; b < end; ++b)
      jitter(from + b * count * C, order + 4 * b, factor + 4 * b, gray[b], solarize[b], to + b * count * C);
  });
}

at::Tensor color_jitter(const at::Tensor& images, const at::Tensor& order, const at::Tensor& factors,
                        const at::Tensor& gray, const at::Tensor& solarize) {
  const at::Tensor pixels = images.contiguous(), stages = order.contiguous(), strengths = factors.contiguous();
  const at::Tensor grays = gray.contiguous(), inverted = solarize.contiguous();
  at::Tensor out = at::empty(images.sizes(), images.options());
  if (out.numel() == 0) return out;
  const auto all = images.size(3) == 1 ? jitter_all<1> : jitter_all<3>;
  TORCH_CHECK(images.size(3) == 1 || images.size(3) == 3, "want 1 or 3 channels, got ", images.size(3));
  all(pixels, stages.const_data_ptr<int64_t>(), strengths.const_data_ptr<float>(), grays.const_data_ptr<bool>(),
      inverted.const_data_ptr<bool>(), out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) { m.impl("native_color_jitter", color_jitter); }

}  // namespace fastmim
