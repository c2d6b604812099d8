// The device-specific half of the patch operations: data movement between strided latents and tokens, converting the
// dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "patch_geometry.h"

namespace anyflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void pack_cpu(const Tensor& latents, Tensor& tokens, const PatchGeometry& g);
void unpack_cpu(const Tensor& tokens, Tensor& latents, const PatchGeometry& g);

#ifdef ANYFLOW_WITH_CUDA
void pack_cuda(const Tensor& latents, Tensor& tokens, const PatchGeometry& g);
void unpack_cuda(const Tensor& tokens, Tensor& latents, const PatchGeometry& g);
#endif

}  // namespace anyflow
