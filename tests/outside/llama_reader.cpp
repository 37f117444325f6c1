// What llama.cpp's own reader makes of a control vector: `reader FILE STRENGTH` writes one float32 vector for each block
// from block 1 on, zero where the file has none. With the header and libraries of llama.cpp:
//
//     g++ tests/outside/llama_reader.cpp -o reader -I LLAMA/common -I LLAMA/include -I LLAMA/ggml/include
//         -L LIBRARIES -l:libllama-common.so -l:libllama.so -l:libggml.so -l:libggml-base.so

#include <cstdio>
#include <cstdlib>

#include "common.h"

int main(int count, char ** words) {
    if (count != 3) {
        return 2;
    }
    const auto read = common_control_vector_load({{std::strtof(words[2], nullptr), words[1]}});
    return std::fwrite(read.data.data(), sizeof(float), read.data.size(), stdout) == read.data.size() ? 0 : 1;
}
