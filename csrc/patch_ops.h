// The device-specific half of the patch operations: data movement between strided latents and tokens, converting the
// dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include "patch_geometry.h"

namespace anyflow {

void pack_cpu(const at::Tensor& latents, at::Tensor& tokens, const PatchGeometry& g);
void unpack_cpu(const at::Tensor& tokens, at::Tensor& latents, const PatchGeometry& g);

#ifdef ANYFLOW_WITH_CUDA
void pack_cuda(const at::Tensor& latents, at::Tensor& tokens, const PatchGeometry& g);
void unpack_cuda(const at::Tensor& tokens, at::Tensor& latents, const PatchGeometry& g);
#endif

}  // namespace anyflow
