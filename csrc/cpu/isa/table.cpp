// This instruction set's row of the dispatcher.
#include "../kernels.h"
#include "rows_tile.h"

#define CONVKIT_STRING_(x) #x
#define CONVKIT_STRING(x) CONVKIT_STRING_(x)

namespace convkit::cpu::CONVKIT_ISA {

void conv_rows(const ConvArgs&, const Pool&);
void conv_outer(const ConvArgs&, const Pool&);
void conv_planes(const ConvArgs&, const Pool&);
void conv_pointwise(const ConvArgs&, const Pool&);
void conv_grouped(const ConvArgs&, const Pool&);
void depthwise(const ConvArgs&, Pass, const Pool&);
void winograd(const ConvArgs&, Pass, const Pool&);
int64_t separable_workspace(const SeparableArgs&, const Pool&);
void separable(const SeparableArgs&, const Pool&);
int64_t channel_workspace(const ChannelShape&, int);
void channel_sum(const ChannelShape&, const void*, void*, void*, const Pool&);
void batch_norm_relu(const BatchNormArgs&, const Pool&);
void batch_norm_relu_grad(const BatchNormArgs&, const Pool&);
void im2col(const ColumnsArgs&, const Pool&);
void col2im(const ColumnsArgs&, const Pool&);
int64_t max_pool_workspace(const MaxPoolArgs&, int);
void max_pool(const MaxPoolArgs&, void*, const Pool&);
void max_pool_grad(const MaxPoolArgs&, void*, const Pool&);
void max_pool_pick(const MaxPoolArgs&, const Pool&);

namespace {
void conv(const ConvArgs& a, Pass pass, const Pool& pool) {
  switch (a.plan.kernel) {
    case ConvKernel::rows: return conv_rows(a, pool);
    case ConvKernel::grouped: return conv_grouped(a, pool);
    case ConvKernel::outer: return conv_outer(a, pool);
    case ConvKernel::planes: return conv_planes(a, pool);
    case ConvKernel::pointwise: return conv_pointwise(a, pool);
    case ConvKernel::depthwise: return depthwise(a, pass, pool);
    case ConvKernel::winograd: return winograd(a, pass, pool);
  }
}
}  // namespace

extern const Kernels table;
const Kernels table = {
    {CONVKIT_STRING(CONVKIT_ISA), false, kVectorBytes, 0, 0, {kTileRows[0], kTileRows[1], kTileRows[2], kTileRows[3], kTileRows[4]}},
    conv, separable_workspace, separable, channel_workspace, channel_sum, batch_norm_relu, batch_norm_relu_grad, im2col, col2im,
    max_pool_workspace, max_pool, max_pool_grad, max_pool_pick,
};

}  // namespace convkit::cpu::CONVKIT_ISA
