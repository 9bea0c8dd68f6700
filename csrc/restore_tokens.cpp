// fastmim::restore_tokens on the CPU: kernels/fastmim_kernels/restore_tokens.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <tuple>

#include "rows.h"

namespace fastmim {
namespace {

at::Tensor restore_tokens(const at::Tensor& tokens, const at::Tensor& source, const at::Tensor& mask_token,
                          const at::Tensor& pos) {
  const at::Tensor places = source.contiguous();
  const int64_t N = source.size(1), D = tokens.size(1), item = tokens.element_size();
  at::Tensor out = at::empty({source.size(0), N, D}, tokens.options());
  char* rows = mutable_bytes(out);
  const int64_t* place = places.const_data_ptr<int64_t>();
  const float *mask = mask_token.const_data_ptr<float>(), *pos_rows = pos.const_data_ptr<float>();
  at::parallel_for(0, places.numel(), grain(D), [&](int64_t begin, int64_t end) {
    Reader read(tokens.scalar_type(), D);
    Writer writer(tokens.scalar_type(), D);
    for (int64_t row = begin; row < end; ++row) {
      const char* token = bytes(tokens) + place[row] * tokens.stride(0) * item;
      const float* x = place[row] < 0 ? mask : read(token, D);
      const float* p = pos_rows + row % N * pos.stride(0);
      char* to = rows + row * D * item;
      float* y = writer.begin(to);
      int64_t i = 0;
      for (; i + LANES <= D; i += LANES) store(y + i, load(x + i) + load(p + i));
      for (; i < D; ++i) y[i] = x[i] + p[i];
      writer.end(to, D);
    }
  });
  return out;
}

void add(float* sum, const float* x, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(sum + i, load(sum + i) + load(x + i));
  for (; i < count; ++i) sum[i] += x[i];
}

// One task per position: its gradients are written or summed over the samples in their order.
std::tuple<at::Tensor, at::Tensor, at::Tensor> restore_tokens_backward(const at::Tensor& dout,
                                                                       const at::Tensor& source,
                                                                       int64_t num_tokens, bool need_tokens,
                                                                       bool need_mask, bool need_pos) {
  const at::Tensor places = source.contiguous(), drows = dout.contiguous();
  const int64_t B = dout.size(0), N = dout.size(1), D = dout.size(2), row_bytes = D * dout.element_size();
  const int64_t* place = places.const_data_ptr<int64_t>();
  const char* rows = bytes(drows);
  const auto fp32 = dout.options().dtype(at::kFloat);
  at::Tensor dtokens = at::empty({need_tokens ? num_tokens : 0, D}, dout.options());
  at::Tensor mask_sum = at::empty({need_mask ? N : 0, D}, fp32), dpos = at::empty({N, D}, fp32);
  char* token_rows = mutable_bytes(dtokens);
  float *mask_rows = mask_sum.mutable_data_ptr<float>(), *pos_rows = dpos.mutable_data_ptr<float>();
  std::vector<uint8_t> asked(need_tokens ? num_tokens : 0, 0);
  at::parallel_for(0, N, grain(B * D), [&](int64_t begin, int64_t end) {
    Reader read(dout.scalar_type(), D);
    for (int64_t n = begin; n < end; ++n) {
      std::memset(pos_rows + n * D, 0, D * sizeof(float));
      if (need_mask) std::memset(mask_rows + n * D, 0, D * sizeof(float));
      for (int64_t b = 0; b < B; ++b) {
        const int64_t token = place[b * N + n];
        const char* row = rows + (b * N + n) * row_bytes;
        if (need_tokens && token >= 0) {
          std::memcpy(token_rows + token * row_bytes, row, row_bytes);
          asked[token] = 1;
        }
        const bool to_mask = need_mask && token < 0;
        if (!to_mask && !need_pos) continue;
        const float* g = read(row, D);
        if (to_mask) add(mask_rows + n * D, g, D);
        if (need_pos) add(pos_rows + n * D, g, D);
      }
    }
  });
  for (int64_t r = 0; r < static_cast<int64_t>(asked.size()); ++r)
    if (!asked[r]) std::memset(token_rows + r * row_bytes, 0, row_bytes);
  return {dtokens, mask_sum.sum(0), dpos};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) {
  m.impl("native_restore_tokens", restore_tokens);
  m.impl("native_restore_tokens_backward", restore_tokens_backward);
}

}  // namespace fastmim
