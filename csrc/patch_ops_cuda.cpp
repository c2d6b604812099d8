// Between torch's tensors and the CUDA launchers: device, stream, element types.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "patch_cuda.h"
#include "patch_ops.h"

namespace anyflow {
namespace {

Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::f32;
    case at::kBFloat16: return Element::bf16;
    case at::kHalf: return Element::f16;
    case at::kDouble: return Element::f64;
    default: TORCH_CHECK(false, "got dtype ", tensor.scalar_type(), ", expected float32, bfloat16, float16 or float64");
  }
}

}  // namespace

void pack_cuda(const at::Tensor& latents, at::Tensor& tokens, const PatchGeometry& g) {
  const c10::cuda::CUDAGuard guard(latents.device());
  C10_CUDA_CHECK(launch_pack(latents.const_data_ptr(), element_of(latents), tokens.mutable_data_ptr(),
                             element_of(tokens), g, c10::cuda::getCurrentCUDAStream()));
}

void unpack_cuda(const at::Tensor& tokens, at::Tensor& latents, const PatchGeometry& g) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  C10_CUDA_CHECK(launch_unpack(tokens.const_data_ptr(), element_of(tokens), latents.mutable_data_ptr(),
                               element_of(latents), g, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace anyflow
