// All CPU kernels of one instruction set; included with LPA_WIDTH (see simd.h), LPA_TABLE and LPA_NAME set.

#include "attack.inl"
#include "attention.inl"
#include "block.inl"

namespace lpa::cpu {

const Kernels LPA_TABLE = {
    LPA_NAME,      perturb_rows,           update_rows, token_loss_rows,  //
    add_norm_rows, add_norm_backward_rows, gate_rows,   attention_floats, attention_pairs,
};

}  // namespace lpa::cpu
