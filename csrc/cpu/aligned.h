// Scratch memory that starts on a cache line: a vector that crosses one costs a second load (10 % of a product's loop).
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace diffmem::cpu {

template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(std::size_t count) { resize(count); }
  void resize(std::size_t count) {  // contents are lost
    if (count <= size_) return;
    data_.reset(static_cast<T*>(::operator new[](count * sizeof(T), kAlignment)));
    size_ = count;
  }
  T* data() { return data_.get(); }
  T& operator[](std::size_t i) { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, kAlignment); }
  };
  std::unique_ptr<T[], Delete> data_;
  std::size_t size_ = 0;
};

}  // namespace diffmem::cpu
