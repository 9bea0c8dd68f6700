// fastmim::info_nce on the CPU: kernels/fastmim_kernels/info_nce.py.
//
//   w = dloss * p / (tau |q|)    p the softmax, less one at the label
//   dq = w k^ - q^ (dloss sum_j p_j s_j) / |q|        dk^ = w^T q
//
// A position, or a block of its rows, is one thread's: its products need no word between threads, and its logits,
// a few rows at a time, stay in the thread's cache.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "exp.h"
#include "rows.h"

namespace fastmim {
namespace {

constexpr float EPS = 1e-12f;             // the least norm that divides: torch.nn.functional.normalize's
constexpr int64_t BLOCK_LOGITS = 1 << 16;  // 256 kB, a part of a core's own cache

float dot(const float* a, const float* b, int64_t count) {
  Floats lanes{};
  float total = 0;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) lanes += load(a + i) * load(b + i);
  for (; i < count; ++i) total += a[i] * b[i];
  return total + sum_lanes(lanes);
}

float scale_and_max(float* s, float factor, float divisor, int64_t count) {
  Floats top = -INFINITY;
  float last = -INFINITY;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats v = load(s + i) * factor / divisor;
    store(s + i, v);
    top = choose(v > top, v, top);
  }
  for (; i < count; ++i) last = std::max(last, s[i] = s[i] * factor / divisor);
  for (int lane = 0; lane < LANES; ++lane) last = std::max(last, top[lane]);
  return last;
}

// s becomes exp(s - top); returns the sum, and in `inner` the sum of s * exp(s - top).
float exp_and_sum(float* s, float top, int64_t count, float* inner = nullptr) {
  Floats total{}, weighted{};
  int64_t i = 0;
  for (; i < count; i += LANES) {
    const int64_t left = std::min(LANES, count - i);
    Floats v = -INFINITY;
    if (left == LANES) v = load(s + i); else std::memcpy(v.part, s + i, left * sizeof(float));
    const Floats e = exp_negative(v - top);
    if (left == LANES) store(s + i, e); else std::memcpy(s + i, e.part, left * sizeof(float));
    total += e;
    weighted += choose(v > -INFINITY, v * e, Floats());
  }
  if (inner) *inner = sum_lanes(weighted);
  return sum_lanes(total);
}

// Rows of one position as fp32, and what divides each; a row of fp32 is left where it is.
struct Rows {
  Rows(const at::Tensor& x, int64_t n, int64_t begin, int64_t end, bool normalize)
      : rows(x.select(1, n).slice(0, begin, end).to(at::kFloat)), norm(end - begin, 1.0f) {
    const float* data = rows.const_data_ptr<float>();
    for (int64_t i = 0; normalize && i < end - begin; ++i) {
      const float* row = data + i * rows.stride(0);
      norm[i] = std::sqrt(dot(row, row, rows.size(1)));
    }
  }

  at::Tensor unit() const {
    const int64_t D = rows.size(1);
    at::Tensor out = at::empty(rows.sizes(), rows.options());
    const float* from = rows.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    for (int64_t i = 0; i < rows.size(0); ++i)
      for (int64_t j = 0; j < D; ++j) to[i * D + j] = from[i * rows.stride(0) + j] / std::max(norm[i], EPS);
    return out;
  }

  float per_norm(int64_t i) const { return 1.0f / std::max(norm[i], EPS); }

  at::Tensor rows;
  std::vector<float> norm;
};

// The gradient of x from that of its direction divided by its norm: what lies along it changes no cosine.
void off_direction(float* dx, const float* x, float along, float norm, int64_t D) {
  if (norm <= EPS) return;
  for (int64_t j = 0; j < D; ++j) dx[j] -= x[j] * along;
}

void write_rows(const float* from, at::Tensor& to, int64_t n, int64_t begin, int64_t end) {
  const int64_t D = to.size(2), item = to.element_size();
  Writer writer(to.scalar_type(), D);
  for (int64_t i = begin; i < end; ++i) {
    char* row = mutable_bytes(to) + (i * to.stride(0) + n * to.stride(1)) * item;
    std::memcpy(writer.begin(row), from + (i - begin) * D, D * sizeof(float));
    writer.end(row, D);
  }
}

// The gradient of the keys from that of their directions, in place, to its rows of dk.
void write_keys(at::Tensor& dkeys, const Rows& rows, const at::Tensor& keys, bool normalize, at::Tensor& dk,
                int64_t n) {
  const int64_t G = keys.size(0), D = keys.size(1);
  float* dx = dkeys.mutable_data_ptr<float>();
  const float* unit = keys.const_data_ptr<float>();
  for (int64_t i = 0; normalize && i < G; ++i) {
    off_direction(dx + i * D, unit + i * D, dot(dx + i * D, unit + i * D, D), rows.norm[i], D);
    for (int64_t j = 0; j < D; ++j) dx[i * D + j] *= rows.per_norm(i);
  }
  write_rows(dx, dk, n, 0, G);
}

int64_t block_rows(int64_t G) { return std::max<int64_t>(32, BLOCK_LOGITS / std::max<int64_t>(1, G)); }

// Calls `work(scratch)(n, b, keys)` for every position n and block of rows from b on, `keys` the unit keys of n.
// Where there are positions for all threads each takes some whole; else all share the blocks of one position.
template <typename Start>
void for_blocks(const at::Tensor& q, const at::Tensor& k, bool normalize, const Start& start) {
  const int64_t B = q.size(0), N = q.size(1), G = k.size(0), block = block_rows(G);
  if (N >= at::get_num_threads()) {
    at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView below;  // this thread's: the caller's does not reach it
      auto work = start();
      for (int64_t n = begin; n < end; ++n) {
        const at::Tensor keys = Rows(k, n, 0, G, normalize).unit();
        for (int64_t b = 0; b < B; b += block) work(n, b, keys);
      }
    });
    return;
  }
  at::AutoDispatchBelowADInplaceOrView below;
  for (int64_t n = 0; n < N; ++n) {
    const at::Tensor keys = Rows(k, n, 0, G, normalize).unit();
    at::parallel_for(0, (B + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView below;
      auto work = start();
      for (int64_t b = begin * block; b < std::min(end * block, B); b += block) work(n, b, keys);
    });
  }
}

// The key that is the positive of a row: its own row from `offset` on, or what `labels` [B, N] names.
struct Labels {
  Labels(const std::optional<at::Tensor>& given, int64_t offset, int64_t N)
      : kept(given ? given->contiguous() : at::Tensor()), offset(offset), N(N) {
    if (given) named = kept.const_data_ptr<int64_t>();
  }

  int64_t of(int64_t b, int64_t n) const { return named ? named[b * N + n] : b + offset; }

  at::Tensor kept;
  const int64_t* named = nullptr;
  int64_t offset, N;
};

std::tuple<at::Tensor, at::Tensor> info_nce(const at::Tensor& q, const at::Tensor& k, double temperature,
                                            int64_t offset, bool normalize,
                                            const std::optional<at::Tensor>& given) {
  const int64_t B = q.size(0), N = q.size(1), G = k.size(0), block = block_rows(G);
  const float tau = static_cast<float>(temperature);
  at::Tensor loss = at::empty({B, N}, q.options().dtype(at::kFloat)), lse = at::empty_like(loss);
  float *losses = loss.mutable_data_ptr<float>(), *sums = lse.mutable_data_ptr<float>();
  const Labels labels(given, offset, N);
  for_blocks(q, k, normalize, [&] {
    return [&, logits = at::empty({std::min(block, B), G}, loss.options())](int64_t n, int64_t b,
                                                                          const at::Tensor& keys) {
      const Rows queries(q, n, b, std::min(b + block, B), normalize);
      at::Tensor s = logits.narrow(0, 0, queries.rows.size(0));
      at::mm_out(s, queries.rows, keys.t());
      float* row = s.mutable_data_ptr<float>();
      for (int64_t i = 0; i < s.size(0); ++i, row += G) {
        const float top = scale_and_max(row, queries.per_norm(i), tau, G);
        const float positive = row[labels.of(b + i, n)];
        const float total = std::log(exp_and_sum(row, top, G)) + top;
        losses[(b + i) * N + n] = total - positive;
        sums[(b + i) * N + n] = total;
      }
    };
  });
  return {loss, lse};
}

// The rows of logits of one block, made again, become w; what goes along each query comes beside them.
void weights(at::Tensor& w, const Rows& queries, const at::Tensor& keys, const float* slope, const float* lse,
             const Labels& labels, int64_t b, int64_t n, float tau, float* along) {
  const int64_t G = keys.size(0);
  at::mm_out(w, queries.rows, keys.t());
  float* row = w.mutable_data_ptr<float>();
  for (int64_t i = 0; i < w.size(0); ++i, row += G) {
    const int64_t at = (b + i) * labels.N + n, label = labels.of(b + i, n);
    const float per_norm = queries.per_norm(i), g = slope[at];
    scale_and_max(row, per_norm, tau, G);
    const float positive = row[label];
    float inner;
    exp_and_sum(row, lse[at], G, &inner);
    row[label] -= 1.0f;
    along[i] = g * (inner - positive) * per_norm * per_norm;
    const float factor = g / tau * per_norm;
    for (int64_t j = 0; j < G; ++j) row[j] *= factor;
  }
}

std::tuple<at::Tensor, at::Tensor> info_nce_backward(const at::Tensor& dloss, const at::Tensor& q,
                                                     const at::Tensor& k, const at::Tensor& lse,
                                                     double temperature, int64_t offset, bool normalize,
                                                     bool need_q, bool need_k,
                                                     const std::optional<at::Tensor>& given) {
  const int64_t B = q.size(0), N = q.size(1), G = k.size(0), D = q.size(2), block = block_rows(G);
  TORCH_CHECK(!need_k || N >= at::get_num_threads(), "the keys of one position are one thread's");
  const float tau = static_cast<float>(temperature);
  const at::Tensor slopes = dloss.contiguous();
  const float *slope = slopes.const_data_ptr<float>(), *sums = lse.const_data_ptr<float>();
  at::Tensor dq = at::empty({need_q ? B : 0, N, D}, q.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor dk = at::empty({need_k ? G : 0, N, D}, k.options().memory_format(at::MemoryFormat::Contiguous));
  const auto fp32 = q.options().dtype(at::kFloat);
  if (need_k && B == 0) dk.zero_();
  const Labels labels(given, offset, N);
  for_blocks(q, k, normalize, [&] {
    const int64_t most = std::min(block, B);
    return [&, logits = at::empty({most, G}, fp32), products = at::empty({need_q ? most : 0, D}, fp32),
            dkeys = at::empty({need_k ? G : 0, D}, fp32), along = std::vector<float>(most)](
               int64_t n, int64_t b, const at::Tensor& keys) mutable {
      const Rows queries(q, n, b, std::min(b + block, B), normalize);
      const int64_t count = queries.rows.size(0);
      at::Tensor w = logits.narrow(0, 0, count);
      weights(w, queries, keys, slope, sums, labels, b, n, tau, along.data());
      if (need_k) {
        at::addmm_out(dkeys, dkeys, w.t(), queries.rows, b == 0 ? 0 : 1);
        if (b + block >= B) write_keys(dkeys, Rows(k, n, 0, G, normalize), keys, normalize, dk, n);
      }
      if (!need_q) return;
      at::Tensor product = products.narrow(0, 0, count);
      at::mm_out(product, w, keys);
      float* dx = product.mutable_data_ptr<float>();
      const float* x = queries.rows.const_data_ptr<float>();
      for (int64_t i = 0; normalize && i < count; ++i)
        off_direction(dx + i * D, x + i * queries.rows.stride(0), along[i], queries.norm[i], D);
      write_rows(dx, dq, n, b, b + count);
    };
  });
  return {dq, dk};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) {
  m.impl("native_info_nce", info_nce);
  m.impl("native_info_nce_backward", info_nce_backward);
}

}  // namespace fastmim
