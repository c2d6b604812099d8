// Between torch's tensors and the CUDA launchers: device, stream, element types.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "patch_cuda.h"
#include "patch_ops.h"

namespace anyflow {
namespace {

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: return Element::f64;  // patch_ops.cpp lets no other through
  }
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

void pack_cuda(const Tensor& latents, Tensor& tokens, const PatchGeometry& g) {
  const torch::stable::accelerator::DeviceGuard guard(latents.get_device_index());
  STD_CUDA_CHECK(launch_pack(latents.const_data_ptr(), element_of(latents), tokens.mutable_data_ptr(),
                             element_of(tokens), g, current_stream(latents)));
}

void unpack_cuda(const Tensor& tokens, Tensor& latents, const PatchGeometry& g) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  STD_CUDA_CHECK(launch_unpack(tokens.const_data_ptr(), element_of(tokens), latents.mutable_data_ptr(),
                               element_of(latents), g, current_stream(tokens)));
}

}  // namespace anyflow
