// What attention.cpp and the kernels of every instruction set share: the description of one call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pygpt {

// Queries and keys are taken in blocks of 64.
constexpr int64_t kAttentionBlock = 64;
// With at most this many queries nothing is packed: keys and values are read once, as they lie.
constexpr int64_t kDecodeQueries = 4;
// Of a work item of that path, at most: keys, and elements that its heads have for each key.
constexpr int64_t kDecodeKeys = 256, kDecodeElements = 1024;
// Queries and keys that backward by AMX tiles takes together.
constexpr int64_t kTileQueries = 256, kTileKeys = 256;

// A (batch, time, head, D) tensor of unit stride in D; strides in elements.
template <class T>
struct HeadView {
  T* data;
  int64_t batch, time, head;

  T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * time + h * head; }
};

struct Dropout {
  bool on;
  uint32_t threshold;  // an element is dropped if its random word is below this
  float inverse_keep;  // 1 / (1 - p)
  uint32_t key[2];
};

struct AttentionShape {
  int64_t B, T, H, S, D;
  float scale;
  Dropout dropout;
  const int32_t* document_start;  // (B, T), in 0 .. query + S - T and not decreasing along T; null: all zero
  double pairs;                   // (query, key) pairs that see each other, of all batches and one head

  // The first and one past the last key that a query sees. Queries beyond the last one see no less.
  int64_t first_key(int64_t head, int64_t query) const {
    return document_start && query < T ? document_start[head / H * T + query] : 0;
  }
  int64_t end_key(int64_t query) const { return query + S - T + 1; }
  // Whether the queries from this one on all see the keys before end, or may as far as documents are not asked.
  bool all_see(int64_t query, int64_t end) const { return !document_start && end_key(query) >= end; }
  // Row length of every packed buffer, in floats: the columns beyond D are zero.
  int64_t width() const { return (D + 31) / 32 * 32; }
  int64_t query_blocks() const { return (T + kAttentionBlock - 1) / kAttentionBlock; }
  int64_t key_blocks() const { return (S + kAttentionBlock - 1) / kAttentionBlock; }
  int64_t decode_chunks() const { return (S + kDecodeKeys - 1) / kDecodeKeys; }
  int64_t decode_keys() const {  // of a chunk: whole blocks, about as many in each
    return (key_blocks() + decode_chunks() - 1) / decode_chunks() * kAttentionBlock;
  }
  // The blocks of keys that a block of queries sees, wholly or in part: from the first, up to the end.
  int64_t first_key_block(int64_t head, int64_t query_block) const {
    return first_key(head, query_block * kAttentionBlock) / kAttentionBlock;
  }
  int64_t end_key_block(int64_t query_block) const {
    const int64_t end = query_block * kAttentionBlock + kAttentionBlock;
    return ((end < T ? end : T) + S - T + kAttentionBlock - 1) / kAttentionBlock;
  }
  // The first block of queries that sees a block of keys; one past the last query and one past the last block that do.
  int64_t first_query_block(int64_t key_block) const {
    const int64_t query = key_block * kAttentionBlock - (S - T);
    return query > 0 ? query / kAttentionBlock : 0;
  }
  int64_t end_query(int64_t head, int64_t key_block) const {
    if (!document_start) return T;
    const int32_t* starts = document_start + head / H * T;
    return std::lower_bound(starts, starts + T, (key_block + 1) * kAttentionBlock) - starts;
  }
  int64_t end_query_block(int64_t head, int64_t key_block) const {
    const int64_t end = (end_query(head, key_block) + kAttentionBlock - 1) / kAttentionBlock;
    return std::max(end, first_query_block(key_block));
  }

  // Floats of workspace per thread: forward, backward; for decode, of each chunk of each head.
  int64_t forward_workspace() const {
    return (2 * key_blocks() + 2) * kAttentionBlock * width() + kAttentionBlock * (2 * (32 + 16) + 2) +
           (key_blocks() + 15) / 16 * 16;
  }
  int64_t backward_workspace() const {
    return (3 * query_blocks() + 5) * kAttentionBlock * width() + 2 * query_blocks() * kAttentionBlock +
           (64 + 3 * kAttentionBlock) * kAttentionBlock;
  }
  // The same of backward by AMX tiles, whose blocks of 32 x 32 are of 512 floats as operands and 1,024 as results.
  int64_t tiles_backward_workspace() const {
    const int64_t steps = (T + 31) / 32, n = width() / 32, keys = kTileKeys / 32, queries = kTileQueries / 32;
    return (4 * steps * n + 3 * keys * n + 2 * queries + queries * keys) * 512 + (steps * n + 2 * keys * n + 2) * 1024 +
           4 * 32 * steps + 64 * queries;
  }
  int64_t decode_workspace() const { return T * (2 * width() + 2 + 16); }  // 16: lanes, at most
};

template <class T>
struct BackwardInputs {
  HeadView<const T> q, k, v, grad;
  const T* out;      // (B, T, H, D)
  const float* lse;  // (B, H, T)
};

// Gradients, (B, T or S, H, D); without data where a call is not to compute them.
template <class T>
struct BackwardOutputs {
  HeadView<T> q, k, v;
};

// Blocks begin .. end of 64 queries or keys.
struct Range {
  int64_t begin, end;
};

}  // namespace pygpt
