// The loss of one row and its gradient: kernels/fastmim_kernels/norm_pix_loss.py.
#pragma once

#include <cmath>

#include "rows.h"

namespace fastmim {

enum Distance : int64_t { L2 = 0, L1 = 1, SMOOTH_L1 = 2 };

struct PixLoss {
  int64_t width;
  bool normalize;
  float eps;
  int64_t distance;
  float beta;

  // The target becomes its normalized self, in place.
  void prepare(float* t) const {
    if (!normalize) return;
    const float mean = sum(t) / width;
    Floats lanes{}, squares{};
    float rest = 0, square = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      const Floats centered = load(t + i) - mean;
      lanes += centered;
      squares += centered * centered;
      store(t + i, centered);
    }
    for (; i < width; ++i) {
      t[i] -= mean;
      rest += t[i];
      square += t[i] * t[i];
    }
    // what the rounding of the mean left is taken back: in a flat patch it would be all that remains
    rest = (rest + sum_lanes(lanes)) / width;
    const float var = (square + sum_lanes(squares) - width * rest * rest) / (width - 1);
    const float rstd = 1.0f / std::sqrt(var + eps);
    i = 0;
    for (; i + LANES <= width; i += LANES) store(t + i, (load(t + i) - rest) * rstd);
    for (; i < width; ++i) t[i] = (t[i] - rest) * rstd;
  }

  float loss(const float* p, const float* t) const {
    Floats lanes{};
    float total = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) lanes += far(load(p + i) - load(t + i));
    for (; i < width; ++i) total += far(p[i] - t[i])[0];
    return (total + sum_lanes(lanes)) / width;
  }

  // Gradient of the prediction, `dloss` that of the row's loss.
  void slope(const float* p, const float* t, float dloss, float* dp) const {
    const float factor = dloss / width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(dp + i, steep(load(p + i) - load(t + i)) * factor);
    for (; i < width; ++i) dp[i] = steep(p[i] - t[i])[0] * factor;
  }

 private:
  float sum(const float* t) const {
    Floats lanes{};
    float total = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) lanes += load(t + i);
    for (; i < width; ++i) total += t[i];
    return total + sum_lanes(lanes);
  }

  Floats far(const Floats& r) const {
    if (distance == L2) return r * r;
    const Floats a = choose(r < 0, -r, r);
    if (distance == L1) return a;
    return choose(a < beta, r * r / (2 * beta), a - beta / 2);
  }

  Floats steep(const Floats& r) const {
    if (distance == L2) return r + r;
    const Floats one = 1;
    const Floats sign = choose(r > 0, one, choose(r < 0, -one, r + 0));  // of NaN it is NaN
    if (distance == L1) return sign;
    return choose(choose(r < 0, -r, r) < beta, r / beta, sign);
  }
};

}  // namespace fastmim
