// SPDX-License-Identifier: Apache-2.0
// What a tensor was when something was made from it: how a kernel knows whether the layout that it
// keeps still holds. It is weak: it keeps nothing alive.
#pragma once

#include <optional>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

using MaybeTensor = std::optional<at::Tensor>;

struct Tag {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
  const void* data = nullptr;
  int64_t version = 0, numel = -1;
  at::ScalarType dtype = at::kByte;

  static Tag of(const MaybeTensor& t) {
    Tag tag;
    if (!t.has_value()) return tag;
    tag.storage = t->storage().getWeakStorageImpl();
    tag.data = t->const_data_ptr();
    tag.version = t->is_inference() ? -1 : static_cast<int64_t>(t->_version());
    tag.numel = t->numel();
    tag.dtype = t->scalar_type();
    return tag;
  }
  bool matches(const MaybeTensor& t) const {
    if (!t.has_value()) return numel < 0;
    return numel == t->numel() && data == t->const_data_ptr() && dtype == t->scalar_type() &&
           !storage.expired() &&
           version == (t->is_inference() ? -1 : static_cast<int64_t>(t->_version()));
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace cofire
