// All kernels of attention for one instruction set (see foreach_isa.h): forward, decoding and backward; at the level amx
// forward and backward of bfloat16 alone.
#include "cpu/philox.h"
#include "cpu/attention_tile.h"
#ifdef PYGPT_AMX
#include "cpu/attention_amx_tile.h"
#include "cpu/attention_amx_forward.h"
#include "cpu/attention_amx_backward.h"
#else
#include "cpu/attention_kernel.h"
#include "cpu/attention_decode_kernel.h"
#include "cpu/attention_backward_kernel.h"
#endif
