// Runs kl_reward_gae.cuh on the cases of a file: driver CASES RESULTS.
#ifndef KERNELS  // a test names a changed copy
#define KERNELS "../kl_reward_gae.cuh"
#endif
#include KERNELS

#include "cases.h"

using namespace engine_cuda;
using emulated::Guarded;

namespace {

template <int kStripes>
void run(const KlRewardGae& p, unsigned threads) {
  Guarded<double> scratch(2 * static_cast<size_t>(kl_reward_gae_windows<kStripes>(p.tokens)));
  int launches = 0;
  launch_kl_reward_gae<kStripes>(p, scratch.data(), threads, nullptr, [&] { ++launches; });
  scratch.check("scratch");
  const int want = p.tokens == 0 ? 0 : p.tokens <= kStripes * kWarp ? 1 : 3;
  if (launches != want) emulated::machine().fail("%d launches checked, want %d", launches, want);
}

void one_case(emulated::Reader& reader, std::FILE* results) {
  const unsigned threads = emulated::set_machine(reader);
  const auto integers = reader.array<int64_t>();  // stripes, estimator
  const auto numbers = reader.array<double>();    // beta, gamma, lam
  Guarded<float> logprob(reader.array<float>()), ref_logprob(reader.array<float>());
  Guarded<float> score(reader.array<float>());
  const auto values = reader.array<float>();
  const auto offsets = reader.array<int32_t>();
  Guarded<float> value(values), bootstrap(reader.array<float>());
  Guarded<int32_t> cu(offsets);
  Guarded<float> advantage(values.size()), returns(values.size()), reward(values.size()), kl(values.size());
  const KlRewardGae p{static_cast<int64_t>(values.size()), static_cast<int64_t>(offsets.size()) - 1,
                      logprob.data(), ref_logprob.data(), value.data(), score.data(), bootstrap.data(), cu.data(),
                      static_cast<float>(numbers.at(0)), numbers.at(1), numbers.at(2), static_cast<int>(integers.at(1)),
                      advantage.data(), returns.data(), reward.data(), kl.data()};
  switch (integers.at(0)) {
    case 1: run<1>(p, threads); break;
    case kKlRewardGaeStripes: run<kKlRewardGaeStripes>(p, threads); break;
    default: emulated::machine().fail("no such number of stripes");
  }
  for (auto* each : {&advantage, &returns, &reward, &kl}) {
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
