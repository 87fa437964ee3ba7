# SPDX-License-Identifier: Apache-2.0
"""The operators, one module per family; importing this package registers them all."""

from cofire.ops.clustering import *  # noqa: F403
from cofire.ops.fake_quantize import *  # noqa: F403
from cofire.ops.gating import *  # noqa: F403
from cofire.ops.kv_fusion import *  # noqa: F403
from cofire.ops.kv_fusion_attention import *  # noqa: F403
from cofire.ops.kv_fusion_masked import *  # noqa: F403
from cofire.ops.lowbit import *  # noqa: F403
from cofire.ops.packing import *  # noqa: F403
from cofire.ops.quantizers import *  # noqa: F403
from cofire.ops.selection import *  # noqa: F403
from cofire.ops.shift_add import *  # noqa: F403
from cofire.ops.shift_add_attention import *  # noqa: F403
from cofire.ops.shift_add_mixture import *  # noqa: F403
from cofire.ops.shift_add_softmax import *  # noqa: F403
from cofire.ops.sparse import *  # noqa: F403
from cofire.ops.sparse_refine import *  # noqa: F403
from cofire.ops.sparse_training import *  # noqa: F403
