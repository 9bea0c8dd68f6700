// fastmim::resized_crop on the CPU: kernels/fastmim_kernels/resized_crop.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "rows.h"

namespace fastmim {
namespace {

constexpr int BITS = 22;           // of a weight's fraction: 255 times the weights of one pixel fit in 32 bits
constexpr int64_t ROWS = 4;        // of one horizontal step: four rows of up to four channels fill a vector
constexpr int64_t CHANNELS = LANES / ROWS;
constexpr double PI = 3.141592653589793, THIRD = PI / 3;
// of the sine's series, highest first
constexpr double SINE[] = {1 / 51090942171709440000.0, -1 / 121645100408832000.0, 1 / 355687428096000.0,
                           -1 / 1307674368000.0, 1 / 6227020800.0, -1 / 39916800.0, 1 / 362880.0,
                           -1 / 5040.0, 1 / 120.0, -1 / 6.0};

double bicubic(double x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

double bilinear(double x) { return std::max(0.0, 1 - x); }

// sinc(x) sinc(x / 3) with a sine of sums and products, which is the same on every processor.
double lanczos(double x) {
  if (x >= 3) return 0;
  if (x == 0) return 1;
  const double b = x * THIRD, r = std::min(b, PI - b), square = r * r;
  double series = 0;
  for (double coefficient : SINE) series = series * square + coefficient;
  const double sine = r + r * square * series, s = sine * sine;
  return s * (1 - s * 4 / 3) / (b * b);
}

double weight_of(int64_t support, double x) {
  return support == 3 ? lanczos(x) : support == 2 ? bicubic(x) : bilinear(x);
}

// Which of `in` values make each of `out`, and with what weight.
struct Taps {
  void make(int64_t in, int64_t out, int64_t reach) {
    const double scale = static_cast<double>(in) / out, wide = std::max(scale, 1.0);
    const double support = reach * wide;
    width = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
    first.resize(out), count.resize(out), weight.resize(out * width), exact.resize(width);
    for (int64_t i = 0; i < out; ++i) {
      const double center = (i + 0.5) * scale;
      first[i] = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
      count[i] = std::min<int64_t>(in, static_cast<int64_t>(center + support + 0.5)) - first[i];
      double total = 0;
      for (int64_t t = 0; t < count[i]; ++t) {
        const double x = std::abs((t + first[i] - center + 0.5) / wide);
        total += exact[t] = weight_of(reach, x);
      }
      for (int64_t t = 0; t < count[i]; ++t) {
        const double scaled = exact[t] / total * (1 << BITS);
        weight[i * width + t] = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      }
    }
  }

  int64_t width = 0;
  std::vector<int64_t> first, count;
  std::vector<int32_t> weight;
  std::vector<double> exact;
};

// Sixteen bytes, each of `count` that lie `stride` apart.
inline Ints weighted(const uint8_t* from, int64_t stride, const int32_t* weight, int64_t count) {
  Ints sum = 1 << (BITS - 1);
  for (int64_t t = 0; t < count; ++t, from += stride) sum += read_bytes(from) * weight[t];
  return sum >> BITS;
}

// One image of C channels at a time; keeps its buffers from one to the next.
template <int64_t C>
class Resizer {
 public:
  Resizer(int64_t height, int64_t width, int64_t support)
      : height_(height), width_(width), support_(support), stride_((width * C + LANES - 1) / LANES * LANES) {}

  void operator()(const uint8_t* box, int64_t line, int64_t box_h, int64_t box_w, bool flip, uint8_t* out) {
    across_.make(box_w, width_, support_);
    down_.make(box_h, height_, support_);
    middle_.resize(((box_h + ROWS - 1) / ROWS * ROWS) * stride_);
    packed_.resize(box_w * LANES);
    for (int64_t y = 0; y < box_h; y += ROWS) {
      pack(box + y * line, line, std::min(ROWS, box_h - y), box_w);
      shrink_rows(middle_.data() + y * stride_, flip);
    }
    shrink_columns(out);
  }

 private:
  void pack(const uint8_t* from, int64_t line, int64_t rows, int64_t box_w) {
    for (int64_t r = 0; r < rows; ++r, from += line)
      for (int64_t x = 0; x < box_w; ++x)
        std::memcpy(packed_.data() + x * LANES + r * CHANNELS, from + x * C, C);
  }

  void shrink_rows(uint8_t* to, bool flip) const {
    for (int64_t x = 0; x < width_; ++x) {
      uint8_t pixels[LANES], *at = to + (flip ? width_ - 1 - x : x) * C;
      write_bytes(pixels, weighted(packed_.data() + across_.first[x] * LANES, LANES,
                                   across_.weight.data() + x * across_.width, across_.count[x]));
      for (int64_t r = 0; r < ROWS; ++r) std::memcpy(at + r * stride_, pixels + r * CHANNELS, C);
    }
  }

  void shrink_columns(uint8_t* out) const {
    const int64_t row = width_ * C;
    for (int64_t y = 0; y < height_; ++y, out += row) {
      const uint8_t* from = middle_.data() + down_.first[y] * stride_;
      const int32_t* weight = down_.weight.data() + y * down_.width;
      for (int64_t i = 0; i < row; i += LANES) {
        const Ints values = weighted(from + i, stride_, weight, down_.count[y]);
        if (row - i >= LANES) {
          write_bytes(out + i, values);
          continue;
        }
        uint8_t last[LANES];
        write_bytes(last, values);
        std::memcpy(out + i, last, row - i);
      }
    }
  }

  int64_t height_, width_, support_;
  int64_t stride_;
  Taps across_, down_;
  std::vector<uint8_t> packed_, middle_;
};

template <int64_t C>
void resize_all(at::TensorList images, const int64_t* box, const bool* flip, int64_t support, at::Tensor& out) {
  const int64_t height = out.size(1), width = out.size(2);
  uint8_t* pixels = out.mutable_data_ptr<uint8_t>();
  std::vector<const uint8_t*> corners(images.size());
  std::vector<int64_t> lines(images.size());
  for (size_t b = 0; b < images.size(); ++b) {  // a tensor's accessors are not for many threads
    lines[b] = images[b].stride(0);
    corners[b] = images[b].const_data_ptr<uint8_t>() + box[4 * b] * lines[b] + box[4 * b + 1] * C;
  }
  at::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    Resizer<C> resize(height, width, support);
    for (int64_t b = begin; b < end; ++b)
      resize(corners[b], lines[b], box[4 * b + 2], box[4 * b + 3], flip[b], pixels + b * height * width * C);
  });
}

at::Tensor resized_crop(at::TensorList images, const at::Tensor& boxes, const at::Tensor& flips, int64_t height,
                        int64_t width, int64_t support) {
  const int64_t B = images.size(), channels = images[0].size(2);
  const at::Tensor places = boxes.contiguous(), turns = flips.contiguous();
  const int64_t* box = places.const_data_ptr<int64_t>();
  const bool* flip = turns.const_data_ptr<bool>();
  at::Tensor out = at::empty({B, height, width, channels}, images[0].options());
  switch (channels) {
    case 1: resize_all<1>(images, box, flip, support, out); break;
    case 2: resize_all<2>(images, box, flip, support, out); break;
    case 3: resize_all<3>(images, box, flip, support, out); break;
    case 4: resize_all<4>(images, box, flip, support, out); break;
    default: TORCH_CHECK(false, "want 1 to 4 channels, got ", channels);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) { m.impl("native_resized_crop", resized_crop); }

}  // namespace fastmim
