// Rows of fp32, bf16, fp16 or uint8, sixteen values at a time.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace fastmim {

inline Floats load(const float* at) { return read(at); }
inline Floats load(const uint8_t* at) { return convert<float>(read_bytes(at)); }
inline Floats load(const c10::BFloat16* at) {
  return bits<float>(convert<uint32_t>(read(reinterpret_cast<const uint16_t*>(at))) << 16);
}
inline Floats load(const c10::Half* at) {
  float v[LANES];
  for (int i = 0; i < LANES; ++i) v[i] = static_cast<float>(at[i]);
  return load(v);
}

inline void store(float* at, Floats v) { write(at, v); }
inline void store(c10::BFloat16* at, Floats v) {
  const Words x = bits<uint32_t>(v), even = (x + 0x7fff + ((x >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Ints nan = (x & 0x7fffffff) > 0x7f800000;
  write(reinterpret_cast<uint16_t*>(at), convert<uint16_t>(choose(nan, Words(0x7fc0), even)));
}
inline void store(c10::Half* at, Floats v) {
  for (int i = 0; i < LANES; ++i) at[i] = static_cast<c10::Half>(v[i]);
}

template <typename T>
void widen(const void* from, float* to, int64_t count) {
  const T* row = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(row + i));
  for (; i < count; ++i) to[i] = static_cast<float>(row[i]);
}

template <typename T>
void narrow(const float* from, void* to, int64_t count) {
  T* row = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(row + i, load(from + i));
  for (; i < count; ++i) row[i] = static_cast<T>(from[i]);
}

// Reads a row of one dtype as fp32: a row of fp32 is not copied.
class Reader {
 public:
  Reader(at::ScalarType dtype, int64_t width) : dtype_(dtype), row_(dtype == at::kFloat ? 0 : width) {}

  const float* operator()(const void* from, int64_t count) {
    switch (dtype_) {
      case at::kFloat: return static_cast<const float*>(from);
      case at::kByte: widen<uint8_t>(from, row_.data(), count); break;
      case at::kBFloat16: widen<c10::BFloat16>(from, row_.data(), count); break;
      case at::kHalf: widen<c10::Half>(from, row_.data(), count); break;
      default: TORCH_CHECK(false, "want fp32, bf16, fp16 or uint8, got ", dtype_);
    }
    return row_.data();
  }

 private:
  at::ScalarType dtype_;
  std::vector<float> row_;
};

// Hands out a row of fp32 to fill and writes it in the dtype of its place: a row of fp32 is filled there.
class Writer {
 public:
  Writer(at::ScalarType dtype, int64_t width) : dtype_(dtype), row_(dtype == at::kFloat ? 0 : width) {}

  float* begin(void* to) { return dtype_ == at::kFloat ? static_cast<float*>(to) : row_.data(); }
  void end(void* to, int64_t count) {
    switch (dtype_) {
      case at::kFloat: break;
      case at::kBFloat16: narrow<c10::BFloat16>(row_.data(), to, count); break;
      case at::kHalf: narrow<c10::Half>(row_.data(), to, count); break;
      default: TORCH_CHECK(false, "want fp32, bf16 or fp16, got ", dtype_);
    }
  }

 private:
  at::ScalarType dtype_;
  std::vector<float> row_;
};

inline float sum_lanes(Floats v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

inline const char* bytes(const at::Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
inline char* mutable_bytes(at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

// Rows per task of about `values` values: enough work to be worth a thread.
inline int64_t grain(int64_t width, int64_t values = 1 << 15) {
  return std::max<int64_t>(1, values / std::max<int64_t>(1, width));
}

}  // namespace fastmim
