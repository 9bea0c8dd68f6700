// The exponential of sixteen values at a time, for softmaxes: of values that are at most 0.
#pragma once

#include "lanes.h"

namespace fastmim {

// exp within two units of the last digit for x <= 0; 0 below -87, where the sum no longer feels it.
inline Floats exp_negative(const Floats& x) {
  const Floats least = -87.0f, v = choose(x < least, least, x);
  const Floats n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const Floats f = (v - n * 0.693359375f) + n * 2.12194440e-4f;    // ln 2 in two parts: the first product is exact
  Floats y = 1.0f / 5040;
  y = y * f + 1.0f / 720;
  y = y * f + 1.0f / 120;
  y = y * f + 1.0f / 24;
  y = y * f + 1.0f / 6;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  const Ints power = (convert<int32_t>(n) + 127) << 23;
  return choose(x < least, Floats(), y * bits<float>(power));
}

}  // namespace fastmim
