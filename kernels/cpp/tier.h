// What kernels are told of a tier.
#include <omp.h>
#include <type_traits>
#include <vector>
namespace kvc {

struct Tier {  // planes of one tier; table [rows, heads, pages]
    const int32_t* table;
    long pages;
    const void* plane[12];
};

struct None {};

}  // namespace kvc
