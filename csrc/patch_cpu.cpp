// Packing and unpacking of patches on the CPU: a strip (one row of the token grid) at a time, strips spread over
// threads.
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "patch_ops.h"

namespace anyflow {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kGrainElements = 1 << 15;  // below this a second thread costs more than it saves

#if defined(__x86_64__) && defined(__GNUC__)
// The baseline instruction set converts fp16 one element at a time in software; F16C, asked for at run time, eight at
// once.
__attribute__((target("avx,f16c"))) int64_t convert_eights(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return i;
}

__attribute__((target("avx,f16c"))) int64_t convert_eights(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return i;
}

bool has_f16c() {
  static const bool has = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  return has;
}
#else
bool has_f16c() { return false; }
template <typename From, typename To>
int64_t convert_eights(const From*, To*, int64_t) {
  return 0;
}
#endif

template <typename To, typename From>
void convert_line(const From* from, int64_t stride, To* to, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i * stride]);
    return;
  }
  int64_t done = 0;
  if constexpr ((std::is_same_v<From, float> && std::is_same_v<To, Half>) ||
                (std::is_same_v<From, Half> && std::is_same_v<To, float>)) {
    if (has_f16c()) done = convert_eights(from, to, count);
  }
  // The compiler vectorises this for fp32, bf16 and float64.
  for (; done < count; ++done) to[done] = static_cast<To>(from[done]);
}

// One latent line against the tokens of a strip: `Width` elements go to (or come from) each token. Width is a template
// argument so that a patch row becomes one 4- to 32-byte move; 0 means any.
template <typename T, int64_t Width>
void scatter_runs(const T* line, T* tokens, int64_t token_stride, int64_t columns, int64_t width) {
  const int64_t run = Width ? Width : width;
  for (int64_t i = 0; i < columns; ++i) std::memcpy(tokens + i * token_stride, line + i * run, run * sizeof(T));
}

template <typename T, int64_t Width>
void gather_runs(const T* tokens, int64_t token_stride, T* line, int64_t columns, int64_t width) {
  const int64_t run = Width ? Width : width;
  for (int64_t i = 0; i < columns; ++i) std::memcpy(line + i * run, tokens + i * token_stride, run * sizeof(T));
}

template <typename T>
void line_to_tokens(const T* line, T* tokens, int64_t feature_stride, const PatchGeometry& g) {
  const int64_t stride = g.token_stride[1], columns = g.columns, width = g.patch_w;
  if (feature_stride != 1) {
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t x = 0; x < width; ++x) tokens[i * stride + x * feature_stride] = line[i * width + x];
  } else if (width == 2) {
    scatter_runs<T, 2>(line, tokens, stride, columns, width);
  } else if (width == 4) {
    scatter_runs<T, 4>(line, tokens, stride, columns, width);
  } else {
    scatter_runs<T, 0>(line, tokens, stride, columns, width);
  }
}

template <typename T>
void tokens_to_line(const T* tokens, int64_t feature_stride, T* line, const PatchGeometry& g) {
  const int64_t stride = g.token_stride[1], columns = g.columns, width = g.patch_w;
  if (feature_stride != 1) {
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t x = 0; x < width; ++x) line[i * width + x] = tokens[i * stride + x * feature_stride];
  } else if (width == 2) {
    gather_runs<T, 2>(tokens, stride, line, columns, width);
  } else if (width == 4) {
    gather_runs<T, 4>(tokens, stride, line, columns, width);
  } else {
    gather_runs<T, 0>(tokens, stride, line, columns, width);
  }
}

// Calls visit(latent offset, feature, feature stride) for each latent line of a strip; offsets are relative to the
// strip.
template <typename Visit>
void for_each_line(const PatchGeometry& g, const Visit& visit) {
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t t = 0; t < g.patch_t; ++t)
      for (int64_t y = 0; y < g.patch_h; ++y) {
        const int64_t latent = c * g.latent_stride[2] + t * g.latent_stride[1] + y * g.latent_stride[3];
        if (g.channels_last) {
          visit(latent, (t * g.patch_h + y) * g.patch_w * g.channels + c, g.channels);
        } else {
          visit(latent, ((c * g.patch_t + t) * g.patch_h + y) * g.patch_w, int64_t{1});
        }
      }
}

template <typename Body>
void for_each_strip(const PatchGeometry& g, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, g.strip_elements()));
  torch::stable::parallel_for(0, g.strips(), grain, body);
}

template <typename Latent, typename Token>
void pack(const Latent* latents, Token* tokens, const PatchGeometry& g) {
  constexpr bool same = std::is_same_v<Latent, Token>;
  for_each_strip(g, [&](int64_t begin, int64_t end) {
    const int64_t stride = g.latent_stride[4], width = g.columns * g.patch_w;
    std::vector<Token> buffer(same && stride == 1 ? 0 : width);
    for (int64_t strip = begin; strip < end; ++strip) {
      const StripOffsets at = strip_offsets(g, strip);
      for_each_line(g, [&](int64_t latent, int64_t feature, int64_t feature_stride) {
        const Latent* source = latents + at.latents + latent;
        const Token* line = buffer.data();
        if constexpr (same) {
          if (stride == 1) line = source;
        }
        if (line == buffer.data()) convert_line(source, stride, buffer.data(), width);
        line_to_tokens(line, tokens + at.tokens + feature, feature_stride, g);
      });
    }
  });
}

template <typename Token, typename Latent>
void unpack(const Token* tokens, Latent* latents, const PatchGeometry& g) {
  constexpr bool same = std::is_same_v<Latent, Token>;
  for_each_strip(g, [&](int64_t begin, int64_t end) {
    const int64_t width = g.columns * g.patch_w;  // the latents are ours: rows are dense
    std::vector<Token> buffer(same ? 0 : width);
    for (int64_t strip = begin; strip < end; ++strip) {
      const StripOffsets at = strip_offsets(g, strip);
      for_each_line(g, [&](int64_t latent, int64_t feature, int64_t feature_stride) {
        const Token* source = tokens + at.tokens + feature;
        Latent* target = latents + at.latents + latent;
        if constexpr (same) {
          tokens_to_line(source, feature_stride, target, g);
        } else {
          tokens_to_line(source, feature_stride, buffer.data(), g);
          convert_line(buffer.data(), 1, target, width);
        }
      });
    }
  });
}

// Calls visit with a null pointer to the element type of a tensor.
template <typename Visit>
void with_type_of(const Tensor& tensor, const Visit& visit) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return visit(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return visit(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half: return visit(static_cast<Half*>(nullptr));
    default: return visit(static_cast<double*>(nullptr));  // patch_ops.cpp lets no other through
  }
}

}  // namespace

void pack_cpu(const Tensor& latents, Tensor& tokens, const PatchGeometry& g) {
  with_type_of(latents, [&](auto* latent) {
    with_type_of(tokens, [&](auto* token) {
      pack(static_cast<const std::remove_pointer_t<decltype(latent)>*>(latents.const_data_ptr()),
           static_cast<decltype(token)>(tokens.mutable_data_ptr()), g);
    });
  });
}

void unpack_cpu(const Tensor& tokens, Tensor& latents, const PatchGeometry& g) {
  with_type_of(tokens, [&](auto* token) {
    with_type_of(latents, [&](auto* latent) {
      unpack(static_cast<const std::remove_pointer_t<decltype(token)>*>(tokens.const_data_ptr()),
             static_cast<decltype(latent)>(latents.mutable_data_ptr()), g);
    });
  });
}

}  // namespace anyflow
