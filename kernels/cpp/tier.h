// What kernels are told of a tier.
#include <omp.h>
#include <vector>
namespace kvc {

struct Tier {  // planes of one tier; table [rows, heads, pages]
    const int32_t* table;
    long pages;
    const void* plane[CONSTANTS + 1];  // the last: the layer's constants
};

struct None {};

}  // namespace kvc
