// Launchers of the CUDA kernels in patch_cuda.cu: plain pointers and integers, so that nvcc alone compiles them.
#pragma once

#include <cuda_runtime_api.h>

#include "patch_geometry.h"

namespace anyflow {

enum class Element { f32, bf16, f16, f64 };

// Latents (strided) to tokens (dense features), and back into latents whose rows are dense.
cudaError_t launch_pack(const void* latents, Element latent, void* tokens, Element token, const PatchGeometry& g,
                        cudaStream_t stream);
cudaError_t launch_unpack(const void* tokens, Element token, void* latents, Element latent, const PatchGeometry& g,
                          cudaStream_t stream);

}  // namespace anyflow
