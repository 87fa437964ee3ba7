// SPDX-License-Identifier: Apache-2.0
// What most sources here read before their first line: setup.py has it parsed once per instruction
// set (half of the time of a small file). Each source still includes what it uses, and
// compiles without this.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "vec.h"
