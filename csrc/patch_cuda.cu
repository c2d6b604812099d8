// Packing and unpacking of patches on CUDA. A block row (blockIdx.x) is a strip, one row of the token grid; within a
// strip indices fit in 32 bits. Every thread writes one 16-byte vector where sizes and addresses allow, else
// one element.
//
// Packing: consecutive threads write consecutive features, so a warp stores whole 128-byte lines. A thread reads `Run`
// neighbouring columns of the latents at once; the rest of their sectors goes to threads of the same warp.
//
// Unpacking: consecutive threads take two neighbouring vectors of a latent row, then the channels, so that reads of
// channel-last tokens coalesce and stores fill 32-byte sectors.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "patch_cuda.h"

namespace anyflow {
namespace {

constexpr int kThreads = 128;
constexpr int kVectorBytes = 16;

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

// Named conversions: torch's build turns the implicit ones of __half and __nv_bfloat16 off.
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <typename To, typename From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(widen(x)));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(widen(x)));
  } else {
    return static_cast<To>(widen(x));
  }
}

struct Feature {
  int channel, t, y, x;
};

__device__ __forceinline__ Feature feature_at(const PatchGeometry& g, int index) {
  const int channels = g.channels, patch_t = g.patch_t, patch_h = g.patch_h, patch_w = g.patch_w;
  Feature f;
  if (g.channels_last) {
    f.channel = index % channels;
    index /= channels;
    f.x = index % patch_w;
    index /= patch_w;
    f.y = index % patch_h;
    f.t = index / patch_h;
  } else {
    f.x = index % patch_w;
    index /= patch_w;
    f.y = index % patch_h;
    index /= patch_h;
    f.t = index % patch_t;
    f.channel = index / patch_t;
  }
  return f;
}

__device__ __forceinline__ int feature_index(const PatchGeometry& g, const Feature& f) {
  const int channels = g.channels, patch_t = g.patch_t, patch_h = g.patch_h, patch_w = g.patch_w;
  return g.channels_last ? ((f.t * patch_h + f.y) * patch_w + f.x) * channels + f.channel
                         : ((f.channel * patch_t + f.t) * patch_h + f.y) * patch_w + f.x;
}

template <typename Latent, typename Token, int Width, int Run>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Latent* __restrict__ latents, Token* __restrict__ tokens, const PatchGeometry g) {
  static_assert(Width % Run == 0, "a vector holds whole runs");
  const StripOffsets at = strip_offsets(g, blockIdx.x);
  const int vectors = static_cast<int>(g.features()) / Width;  // per token
  const int count = static_cast<int>(g.columns) * vectors;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < count; i += gridDim.y * kThreads) {
    const int column = i / vectors, first = i % vectors * Width;
    const Latent* source = latents + at.latents + column * g.patch_w * g.latent_stride[4];
    Vector<Token, Width> out;
#pragma unroll
    for (int j = 0; j < Width; j += Run) {
      const Feature f = feature_at(g, first + j);
      const auto run = *reinterpret_cast<const Vector<Latent, Run>*>(
          source + f.t * g.latent_stride[1] + f.channel * g.latent_stride[2] + f.y * g.latent_stride[3] +
          f.x * g.latent_stride[4]);
#pragma unroll
      for (int r = 0; r < Run; ++r) out.value[j + r] = convert<Token>(run.value[r]);
    }
    *reinterpret_cast<Vector<Token, Width>*>(tokens + at.tokens + column * g.token_stride[1] + first) = out;
  }
}

template <typename Token, typename Latent, int Width>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const Token* __restrict__ tokens, Latent* __restrict__ latents, const PatchGeometry g) {
  const StripOffsets at = strip_offsets(g, blockIdx.x);
  const int channels = g.channels, patch_h = g.patch_h, patch_w = g.patch_w;
  const int vectors = static_cast<int>(g.columns) * patch_w / Width;  // per latent row
  const int pairs = (vectors + 1) / 2;
  const int count = 2 * channels * pairs * static_cast<int>(g.patch_t) * patch_h;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < count; i += gridDim.y * kThreads) {
    const int rest = i / 2 / channels, vector = rest % pairs * 2 + i % 2, line = rest / pairs;
    if (vector >= vectors) continue;
    Feature f{i / 2 % channels, line / patch_h, line % patch_h, 0};
    Vector<Latent, Width> out;
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      const int x = vector * Width + j;
      f.x = x % patch_w;
      out.value[j] = convert<Latent>(tokens[at.tokens + x / patch_w * g.token_stride[1] + feature_index(g, f)]);
    }
    *reinterpret_cast<Vector<Latent, Width>*>(latents + at.latents + f.t * g.latent_stride[1] +
                                              f.channel * g.latent_stride[2] + f.y * g.latent_stride[3] +
                                              vector * Width) = out;
  }
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether every patch row of the latents starts at a multiple of `count` elements, and they are dense along it.
bool latents_allow(const PatchGeometry& g, const void* latents, int64_t count, int64_t element_bytes) {
  bool multiple = g.latent_stride[4] == 1 && aligned(latents, count * element_bytes);
  for (int i = 0; i < 4; ++i) multiple = multiple && g.latent_stride[i] % count == 0;
  return multiple;
}

bool tokens_allow(const PatchGeometry& g, const void* tokens, int64_t count, int64_t element_bytes) {
  return aligned(tokens, count * element_bytes) && g.token_stride[0] % count == 0 && g.token_stride[1] % count == 0 &&
         g.features() % count == 0;
}

cudaError_t grid_for(const PatchGeometry& g, int64_t width, dim3* grid) {
  // A strip has to be counted in 32 bits (with room for the doubling of pairs) and strips in one grid dimension.
  if (g.strip_elements() > (int64_t{1} << 29) || g.strips() > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t blocks = (g.strip_elements() / width + kThreads - 1) / kThreads;
  *grid = dim3(static_cast<unsigned>(g.strips()), static_cast<unsigned>(blocks < 1       ? 1
                                                                        : blocks > 65535 ? 65535
                                                                                         : blocks));
  return cudaSuccess;
}

template <typename Latent, typename Token, int Width, int Run>
cudaError_t start_pack(const void* latents, void* tokens, const PatchGeometry& g, cudaStream_t stream) {
  dim3 grid;
  if (const cudaError_t error = grid_for(g, Width, &grid); error != cudaSuccess) return error;
  pack_kernel<Latent, Token, Width, Run>
      <<<grid, kThreads, 0, stream>>>(static_cast<const Latent*>(latents), static_cast<Token*>(tokens), g);
  return cudaGetLastError();
}

template <typename Latent, typename Token>
cudaError_t pack(const void* latents, void* tokens, const PatchGeometry& g, cudaStream_t stream) {
  constexpr int width = kVectorBytes / sizeof(Token);
  if (!tokens_allow(g, tokens, width, sizeof(Token)))
    return start_pack<Latent, Token, 1, 1>(latents, tokens, g, stream);
  const auto run_fits = [&](int64_t run) {
    return !g.channels_last && g.patch_w % run == 0 && latents_allow(g, latents, run, sizeof(Latent));
  };
  if constexpr (width % 4 == 0 && sizeof(Latent) * 4 <= kVectorBytes) {
    if (run_fits(4)) return start_pack<Latent, Token, width, 4>(latents, tokens, g, stream);
  }
  if (run_fits(2)) return start_pack<Latent, Token, width, 2>(latents, tokens, g, stream);
  return start_pack<Latent, Token, width, 1>(latents, tokens, g, stream);
}

template <typename Token, typename Latent, int Width>
cudaError_t start_unpack(const void* tokens, void* latents, const PatchGeometry& g, cudaStream_t stream) {
  dim3 grid;
  if (const cudaError_t error = grid_for(g, Width, &grid); error != cudaSuccess) return error;
  unpack_kernel<Token, Latent, Width>
      <<<grid, kThreads, 0, stream>>>(static_cast<const Token*>(tokens), static_cast<Latent*>(latents), g);
  return cudaGetLastError();
}

template <typename Token, typename Latent>
cudaError_t unpack(const void* tokens, void* latents, const PatchGeometry& g, cudaStream_t stream) {
  constexpr int width = kVectorBytes / sizeof(Latent);
  const bool fits = g.columns * g.patch_w % width == 0 && latents_allow(g, latents, width, sizeof(Latent));
  return fits ? start_unpack<Token, Latent, width>(tokens, latents, g, stream)
              : start_unpack<Token, Latent, 1>(tokens, latents, g, stream);
}

template <typename T>
struct Type {
  using type = T;
};

template <typename Body>
cudaError_t with_type(Element element, const Body& body) {
  switch (element) {
    case Element::f32: return body(Type<float>{});
    case Element::bf16: return body(Type<__nv_bfloat16>{});
    case Element::f16: return body(Type<__half>{});
    case Element::f64: return body(Type<double>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_pack(const void* latents, Element latent, void* tokens, Element token, const PatchGeometry& g,
                        cudaStream_t stream) {
  return with_type(latent, [&](auto from) {
    return with_type(token, [&](auto to) {
      return pack<typename decltype(from)::type, typename decltype(to)::type>(latents, tokens, g, stream);
    });
  });
}

cudaError_t launch_unpack(const void* tokens, Element token, void* latents, Element latent, const PatchGeometry& g,
                          cudaStream_t stream) {
  return with_type(token, [&](auto from) {
    return with_type(latent, [&](auto to) {
      return unpack<typename decltype(from)::type, typename decltype(to)::type>(tokens, latents, g, stream);
    });
  });
}

}  // namespace anyflow
