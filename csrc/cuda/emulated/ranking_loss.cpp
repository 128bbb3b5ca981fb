// Runs ranking_loss.cuh on the cases of a file: driver CASES RESULTS.
#ifndef KERNELS  // a test names a changed copy
#define KERNELS "../ranking_loss.cuh"
#endif
#include KERNELS

#include "cases.h"

using namespace engine_cuda;
using emulated::Guarded;

namespace {

void one_case(emulated::Reader& reader, std::FILE* results) {
  const unsigned threads = emulated::set_machine(reader);
  const auto integers = reader.array<int64_t>();  // reduction
  const auto numbers = reader.array<double>();    // denominator, 0 for the own count
  const auto scores = reader.array<float>();
  Guarded<float> score(scores);
  Guarded<double> rank(reader.array<double>());
  const auto offsets = reader.array<int32_t>();
  Guarded<int32_t> cu(offsets);
  const size_t prompts = offsets.size() - 1;
  Guarded<double> slope(scores.size()), losses(prompts);
  Guarded<int64_t> pairs(prompts), correct(prompts), num_pairs(1), num_correct(1);
  Guarded<float> loss(1), grad(scores.size());
  const Ranking p{static_cast<int64_t>(scores.size()), static_cast<int64_t>(prompts), score.data(), rank.data(),
                  cu.data()};
  int launches = 0;
  launch_ranking_loss(p, {slope.data(), losses.data(), pairs.data(), correct.data()},
                      static_cast<int>(integers.at(0)), numbers.at(0),
                      {loss.data(), num_pairs.data(), num_correct.data(), grad.data()}, threads, nullptr,
                      [&] { ++launches; });
  if (launches != (prompts > 0 ? 2 : 1)) emulated::machine().fail("%d launches checked", launches);
  for (auto* each : {&loss, &grad}) {
    each->check("an output");
    each->write(results);
  }
  for (auto* each : {&num_pairs, &num_correct}) {
    each->check("an output");
    each->write(results);
  }
}

}  // namespace

int main(int, char** arguments) {
  emulated::Reader reader(arguments[1]);
  std::FILE* results = std::fopen(arguments[2], "wb");
  while (!reader.at_end()) one_case(reader, results);
  std::fclose(results);
}
