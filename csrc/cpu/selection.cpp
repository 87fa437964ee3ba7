// SPDX-License-Identifier: Apache-2.0
// compact: the positions of the set entries of each mask row.
#include "selection.h"

#include <ATen/ops/empty.h>

namespace cofire {
inline namespace CPU_CAPABILITY {

std::tuple<at::Tensor, at::Tensor> compact(const at::Tensor& mask) {
  TORCH_CHECK(mask.dim() == 2, "compact: mask must be 2-D [R, C], got ", mask.dim(), "-D");
  const at::Tensor m = mask.to(at::kBool).contiguous();
  const int64_t rows = m.size(0), columns = m.size(1);
  at::Tensor index = at::empty({rows, columns}, m.options().dtype(at::kInt));
  at::Tensor count = at::empty({rows}, m.options().dtype(at::kInt));
  const bool* mask_data = m.const_data_ptr<bool>();
  int32_t* index_data = index.data_ptr<int32_t>();
  int32_t* count_data = count.data_ptr<int32_t>();
  const int64_t grain = 1 + 65536 / (columns + 1);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      count_data[r] = compact_row(mask_data + r * columns, columns, index_data + r * columns);
    }
  });
  return {index, count};
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) { m.impl("compact", &cofire::compact); }
