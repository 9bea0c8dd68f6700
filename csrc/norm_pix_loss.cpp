// fastmim::norm_pix_loss on the CPU: kernels/fastmim_kernels/norm_pix_loss.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "pix_loss.h"

namespace fastmim {
namespace {

// Reads the target's rows into a row of one's own: `prepare` overwrites it.
class TargetReader {
 public:
  TargetReader(const at::Tensor& target, const PixLoss& rule)
      : rule_(rule), reader_(target.scalar_type(), rule.width), row_(rule.width), rows_(bytes(target)),
        stride_(target.stride(0) * target.element_size()) {}

  const float* operator()(int64_t row) {
    const float* t = reader_(rows_ + row * stride_, rule_.width);
    if (!rule_.normalize) return t;
    std::memcpy(row_.data(), t, rule_.width * sizeof(float));
    rule_.prepare(row_.data());
    return row_.data();
  }

 private:
  const PixLoss& rule_;
  Reader reader_;
  std::vector<float> row_;
  const char* rows_;
  int64_t stride_;
};

at::Tensor norm_pix_loss(const at::Tensor& pred, const at::Tensor& target, bool normalize, double eps,
                         int64_t distance, double beta) {
  const PixLoss rule{pred.size(1), normalize, static_cast<float>(eps), distance, static_cast<float>(beta)};
  at::Tensor out = at::empty({pred.size(0)}, pred.options().dtype(at::kFloat));
  float* loss = out.mutable_data_ptr<float>();
  const int64_t stride = pred.stride(0) * pred.element_size();
  at::parallel_for(0, pred.size(0), grain(rule.width), [&](int64_t begin, int64_t end) {
    Reader read(pred.scalar_type(), rule.width);
    TargetReader read_target(target, rule);
    for (int64_t row = begin; row < end; ++row)
      loss[row] = rule.loss(read(bytes(pred) + row * stride, rule.width), read_target(row));
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> norm_pix_loss_backward(const at::Tensor& dloss, const at::Tensor& pred,
                                                          const at::Tensor& target, bool normalize, double eps,
                                                          int64_t distance, double beta, bool need_pred,
                                                          bool need_target) {
  const PixLoss rule{pred.size(1), normalize, static_cast<float>(eps), distance, static_cast<float>(beta)};
  const int64_t M = pred.size(0), D = rule.width;
  const at::Tensor slopes = dloss.contiguous();
  const float* factor = slopes.const_data_ptr<float>();
  at::Tensor dpred = at::empty({need_pred ? M : 0, D}, pred.options());
  at::Tensor dtarget = at::empty({need_target ? M : 0, D}, target.options());
  char *dp_rows = mutable_bytes(dpred), *dt_rows = mutable_bytes(dtarget);
  const int64_t stride = pred.stride(0) * pred.element_size();
  at::parallel_for(0, M, grain(D), [&](int64_t begin, int64_t end) {
    Reader read(pred.scalar_type(), D);
    TargetReader read_target(target, rule);
    Writer write_pred(pred.scalar_type(), D), write_target(target.scalar_type(), D);
    for (int64_t row = begin; row < end; ++row) {
      const float *p = read(bytes(pred) + row * stride, D), *t = read_target(row);
      if (need_pred) {
        char* to = dp_rows + row * D * pred.element_size();
        rule.slope(p, t, factor[row], write_pred.begin(to));
        write_pred.end(to, D);
      }
      if (need_target) {
        char* to = dt_rows + row * D * target.element_size();
        rule.slope(p, t, -factor[row], write_target.begin(to));
        write_target.end(to, D);
      }
    }
  });
  return {dpred, dtarget};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, m) {
  m.impl("native_norm_pix_loss", norm_pix_loss);
  m.impl("native_norm_pix_loss_backward", norm_pix_loss_backward);
}

}  // namespace fastmim
