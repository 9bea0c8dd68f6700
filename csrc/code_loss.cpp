// fastmim::code_loss on the CPU: kernels/fastmim_kernels/code_loss.py.
//
//   loss_rj = lse_r - sum_k p_u[k] s_r[k] / T_s       p_u = exp((t_u - c) / T_t - lse_u), u = pairs[r, j]
//   ds_r    = (sum_j g_rj softmax(s_r / T_s) - sum_j g_rj p_u) / T_s
//
// The codes are cut into pieces that the cache keeps, and the pieces are shared among the threads: the teacher's
// probabilities of a piece are made once and serve all rows that are compared with them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "exp.h"
#include "rows.h"

namespace fastmim {
namespace {

constexpr int64_t PIECE = 1024;       // codes
constexpr int64_t KEPT_ROWS = 256;    // of the teacher, whose probabilities of a piece are kept: 1 MB

// Calls `work(i, left, full)` for every group of lanes of `count` values.
template <typename F>
inline void lanes_of(int64_t count, F work) {
  for (int64_t i = 0; i < count; i += LANES) work(i, std::min(LANES, count - i));
}

inline Floats load_some(const float* at, int64_t left, float other) {
  if (left == LANES) return load(at);
  Floats v = other;
  std::memcpy(v.part, at, left * sizeof(float));
  return v;
}

inline void store_some(float* at, const Floats& v, int64_t left) {
  if (left == LANES) store(at, v); else std::memcpy(at, v.part, left * sizeof(float));
}

// The log-sum-exp of values that come piece by piece, and their entropy: of x - top, so that no digit is lost.
struct Sums {
  float top = -INFINITY;
  double total = 0, inner = 0;  // of exp(x - top), and of (x - top) exp(x - top)

  void rescale(float higher) {
    if (top == higher) return;
    if (total > 0) {
      const double down = double(top) - higher, factor = std::exp(down);
      inner = (inner + total * down) * factor, total *= factor;
    }
    top = higher;
  }

  void add(const float* x, int64_t count) {
    Floats most = -INFINITY;
    lanes_of(count, [&](int64_t i, int64_t left) {
      const Floats v = load_some(x + i, left, -INFINITY);
      most = choose(v > most, v, most);
    });
    float higher = top;
    for (int lane = 0; lane < LANES; ++lane) higher = std::max(higher, most[lane]);
    if (higher == -INFINITY) return;
    rescale(higher);
    Floats sum{}, weighted{};
    lanes_of(count, [&](int64_t i, int64_t left) {
      const Floats v = load_some(x + i, left, -INFINITY) - top, e = exp_negative(v);
      sum += e;
      weighted += choose(e == 0.0f, Floats(), v * e);
    });
    total += sum_lanes(sum), inner += sum_lanes(weighted);
  }

  void add(const Sums& other) {
    Sums theirs = other;
    if (theirs.top > top) rescale(theirs.top);
    else theirs.rescale(top);
    total += theirs.total, inner += theirs.inner;
  }

  float lse() const { return static_cast<float>(top + std::log(total)); }
  float entropy() const { return static_cast<float>(std::log(total) - inner / total); }
};

// Rows of logits, read as (x - c) / T in pieces.
struct Logits {
  Logits(const at::Tensor& x, const float* center, double temperature)
      : data(bytes(x)), stride(x.stride(0) * x.element_size()), item(x.element_size()), width(x.size(1)),
        dtype(x.scalar_type()), center(center), per_temperature(static_cast<float>(1.0 / temperature)) {}

  void read(Reader& reader, int64_t row, int64_t begin, int64_t count, float* to) const {
    const float* x = reader(data + row * stride + begin * item, count);
    const float* c = center ? center + begin : nullptr;
    lanes_of(count, [&](int64_t i, int64_t left) {
      Floats v = load_some(x + i, left, 0.0f);
      if (c) v = v - load_some(c + i, left, 0.0f);
      store_some(to + i, v * per_temperature, left);
    });
  }

  const char* data;
  int64_t stride, item, width;
  at::ScalarType dtype;
  const float* center;
  float per_temperature;
};

// Probabilities of a piece of the teacher's rows: of all of them, or where they are many of one at a time.
class Teacher {
 public:
  Teacher(const Logits& logits, const float* lse, int64_t rows)
      : logits_(logits), lse_(lse), rows_(rows), kept_(rows <= KEPT_ROWS), reader_(logits.dtype, PIECE),
        p_((kept_ ? rows : 1) * PIECE) {}

  void begin(int64_t begin, int64_t count) {
    begin_ = begin, count_ = count;
    for (int64_t u = 0; kept_ && u < rows_; ++u) make(u, p_.data() + u * PIECE);
  }

  const float* row(int64_t u) {
    if (kept_) return p_.data() + u * PIECE;
    make(u, p_.data());
    return p_.data();
  }

 private:
  void make(int64_t u, float* to) {
    logits_.read(reader_, u, begin_, count_, to);
    lanes_of(count_, [&](int64_t i, int64_t left) {
      store_some(to + i, exp_negative(load_some(to + i, left, 0.0f) - lse_[u]), left);
    });
  }

  const Logits& logits_;
  const float* lse_;
  int64_t rows_, begin_ = 0, count_ = 0;
  bool kept_;
  Reader reader_;
  std::vector<float> p_;
};

// Calls `work(task, begin, end)` with the pieces of each of as many tasks as there are threads.
template <typename F>
int64_t in_tasks(int64_t width, F work) {
  const int64_t pieces = (width + PIECE - 1) / PIECE;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(pieces, at::get_num_threads()));
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
      work(task, pieces * task / tasks, pieces * (task + 1) / tasks);
  });
  return tasks;
}

int64_t most_tasks() { return std::max<int64_t>(1, at::get_num_threads()); }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> code_loss(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& center, const at::Tensor& pairs,
    double student_temperature, double teacher_temperature) {
  const int64_t R = student.size(0), U = teacher.size(0), K = student.size(1), J = pairs.size(1);
  const auto fp32 = student.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  at::Tensor loss = at::empty({R, J}, fp32), lse_r = at::empty({R}, fp32), lse_u = at::empty({U}, fp32),
             entropy = at::empty({U}, fp32);
  const Logits s(student, nullptr, student_temperature);
  const Logits t(teacher, center.const_data_ptr<float>(), teacher_temperature);
  float *lse_teacher = lse_u.mutable_data_ptr<float>(), *entropies = entropy.mutable_data_ptr<float>();
  at::parallel_for(0, U, 1, [&](int64_t begin, int64_t end) {
    Reader reader(t.dtype, PIECE);
    std::vector<float> x(PIECE);
    for (int64_t u = begin; u < end; ++u) {
      Sums sums;
      for (int64_t k = 0; k < K; k += PIECE) {
        t.read(reader, u, k, std::min(PIECE, K - k), x.data());
        sums.add(x.data(), std::min(PIECE, K - k));
      }
      lse_teacher[u] = sums.lse(), entropies[u] = sums.entropy();
    }
  });
  const int64_t* pair = pairs.const_data_ptr<int64_t>();
  std::vector<std::vector<Sums>> sums(most_tasks(), std::vector<Sums>(R));
  std::vector<std::vector<double>> dots(most_tasks(), std::vector<double>(R * J));
  const int64_t tasks = in_tasks(K, [&](int64_t task, int64_t first, int64_t last) {
    Reader reader(s.dtype, PIECE);
    Teacher probabilities(t, lse_teacher, U);
    std::vector<float> y(PIECE);
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * PIECE, count = std::min(PIECE, K - begin);
      probabilities.begin(begin, count);
      for (int64_t r = 0; r < R; ++r) {
        s.read(reader, r, begin, count, y.data());
        sums[task][r].add(y.data(), count);
        for (int64_t j = 0; j < J; ++j) {
          if (pair[r * J + j] < 0) continue;
          const float* p = probabilities.row(pair[r * J + j]);
          Floats dot{};
          lanes_of(count, [&](int64_t i, int64_t left) {
            dot += load_some(p + i, left, 0.0f) * load_some(y.data() + i, left, 0.0f);
          });
          dots[task][r * J + j] += sum_lanes(dot);
        }
      }
    }
  });
  float *losses = loss.mutable_data_ptr<float>(), *lse_student = lse_r.mutable_data_ptr<float>();
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t task = 1; task < tasks; ++task) sums[0][r].add(sums[task][r]);
    lse_student[r] = sums[0][r].lse();
    for (int64_t j = 0; j < J; ++j) {
      double dot = 0;
      for (int64_t task = 0; task < tasks; ++task) dot += dots[task][r * J + j];
      const double exact = sums[0][r].top + std::log(sums[0][r].total) - dot;
      losses[r * J + j] = pair[r * J + j] < 0 ? 0.0f : static_cast<float>(exact);
    }
  }
  return {loss, lse_r, lse_u, entropy};
}

at::Tensor code_loss_backward(const at::Tensor& dloss, const at::Tensor& student, const at::Tensor& teacher,
                              const at::Tensor& center, const at::Tensor& pairs, const at::Tensor& lse_r,
                              const at::Tensor& lse_u, double student_temperature, double teacher_temperature) {
  const int64_t R = student.size(0), U = teacher.size(0), K = student.size(1), J = pairs.size(1);
  at::Tensor ds = at::empty({R, K}, student.options().memory_format(at::MemoryFormat::Contiguous));
  const Logits s(student, nullptr, student_temperature);
  const Logits t(teacher, center.const_data_ptr<float>(), teacher_temperature);
  const float *lse_student = lse_r.const_data_ptr<float>(), *lse_teacher = lse_u.const_data_ptr<float>();
  const at::Tensor slopes = dloss.contiguous();
  const float* slope = slopes.const_data_ptr<float>();
  const int64_t* pair = pairs.const_data_ptr<int64_t>();
  char* to = mutable_bytes(ds);
  in_tasks(K, [&](int64_t, int64_t first, int64_t last) {
    Reader reader(s.dtype, PIECE);
    Writer writer(ds.scalar_type(), PIECE);
    Teacher probabilities(t, lse_teacher, U);
    std::vector<float> y(PIECE);
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * PIECE, count = std::min(PIECE, K - begin);
      probabilities.begin(begin, count);
      for (int64_t r = 0; r < R; ++r) {
        float all = 0;
        for (int64_t j = 0; j < J; ++j) all += pair[r * J + j] < 0 ? 0.0f : slope[r * J + j];
        s.read(reader, r, begin, count, y.data());
        char* row = to + (r * K + begin) * ds.element_size();
        float* out = writer.begin(row);
        lanes_of(count, [&](int64_t i, int64_t left) {
          const Floats q = exp_negative(load_some(y.data() + i, left, 0.0f) - lse_student[r]);
          store_some(out + i, q * (all * s.per_temperature), left);
        });
        for (int64_t j = 0; j < J; ++j) {
          if (pair[r * J + j] < 0) continue;
          const float* p = probabilities.row(pair[r * J + j]);
          const float g = slope[r * J + j] * s.per_temperature;
          lanes_of(count, [&](int64_t i, int64_t left) {
            store_some(out + i, load_some(out + i, left, 0.0f) - load_some(p + i, left, 0.0f) * g, left);
          });
        }
        writer.end(row, count);
      }
    }
  });
  return ds;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) {
  m.impl("native_code_loss", code_loss);
  m.impl("native_code_loss_backward", code_loss_backward);
}

}  // namespace fastmim
