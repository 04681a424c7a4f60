// Memory that a thread keeps for the next time. It is not cleared, and forgets when it grows.
#pragma once

#include <cstdint>
#include <memory>

namespace shoal {

template <class T>
class Room {
 public:
  T* of(int64_t size) {
    if (size > size_) {
      memory_.reset(new T[size]);
      size_ = size;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

}  // namespace shoal
