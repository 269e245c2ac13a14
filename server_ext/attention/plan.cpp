// The forest of common runs.

#include <algorithm>
#include <cstring>
#include <vector>

#include "work.h"

namespace {

struct Member {
  int32_t sequence;
  int64_t common;  // tokens it shares with the group's first member
};

struct Planner {
  const int32_t* table;
  int64_t stride;
  const int64_t* rows;
  const int64_t* lengths;
  int64_t sequence_cost, run_cost;  // in tokens
  int32_t* order;
  Run* runs;
  int64_t n_runs = 0, placed = 0;

  const int32_t* row(const Member& m) const { return table + rows[m.sequence] * stride; }

  int64_t common(const Member& a, const Member& b, int64_t from) const {
    const int32_t *x = row(a), *y = row(b);
    const int64_t end = std::min(lengths[a.sequence], lengths[b.sequence]);
    while (from + 64 <= end) {
      int32_t differs = 0;
      for (int i = 0; i < 64; i++) differs |= x[from + i] ^ y[from + i];
      if (differs) break;
      from += 64;
    }
    while (from < end && x[from] == y[from]) from++;
    return from;
  }

  // How far each member goes with the first, which agree before `from`. The first is one from the
  // middle, so that a chain of forks is not compared anew at each.
  void compare(std::vector<Member>& members, int64_t from) const {
    std::swap(members[0], members[members.size() / 2]);
    for (size_t i = 1; i < members.size(); i++)
      members[i].common = common(members[0], members[i], from);
  }

  // Nobody has read the tokens from `begin` on for these members yet.
  void place(std::vector<Member>& members, int64_t begin) {
    if (members.size() == 1) {
      const Member& only = members[0];
      runs[n_runs++] = {static_cast<int32_t>(rows[only.sequence]), static_cast<int32_t>(begin), -1,
                        static_cast<int32_t>(placed), static_cast<int32_t>(placed)};
      order[placed++] = only.sequence;
      return;
    }
    const Member first = members[0];
    int64_t fork = lengths[first.sequence];
    for (size_t i = 1; i < members.size(); i++) fork = std::min(fork, members[i].common);

    std::vector<std::vector<Member>> groups(1);  // the first one's comes first
    groups[0].push_back(first);
    std::vector<Member> others;
    for (size_t i = 1; i < members.size(); i++)
      (members[i].common > fork ? groups[0] : others).push_back(members[i]);
    const auto slot = [&](const Member& m) {
      return fork < lengths[m.sequence] ? row(m)[fork] : -1;
    };
    std::stable_sort(others.begin(), others.end(),
                     [&](const Member& a, const Member& b) { return slot(a) < slot(b); });
    for (const Member& m : others) {
      const bool joins = groups.size() > 1 && slot(m) >= 0 && slot(groups.back()[0]) == slot(m);
      if (!joins) groups.emplace_back();
      groups.back().push_back(m);
    }
    for (size_t g = 1; g < groups.size(); g++) compare(groups[g], fork + 1);
    const int64_t size = members.size(), branches = groups.size();
    members = {};

    const int64_t saved = (branches - 1) * (fork - begin);
    const bool shared = saved > run_cost + size * sequence_cost;
    const int64_t index = n_runs, from = placed;
    if (shared) n_runs++;
    for (auto& group : groups) place(group, shared ? fork : begin);
    if (shared)
      runs[index] = {static_cast<int32_t>(rows[first.sequence]), static_cast<int32_t>(begin),
                     static_cast<int32_t>(fork), static_cast<int32_t>(from),
                     static_cast<int32_t>(placed - 1)};
  }
};

}  // namespace

extern "C" {

// The forest of common runs of n sequences: `order` [n], `runs` [2n, 5]; returns how many runs. A
// run is used if the tokens it saves are more than run_cost + sequences · sequence_cost.
int64_t plan_forest(const int32_t* table, int64_t stride, const int64_t* rows,
                    const int64_t* lengths, int64_t n, int64_t sequence_cost, int64_t run_cost,
                    int32_t* order, int32_t* runs) {
  Planner planner{table,        stride,   rows,  lengths,
                  sequence_cost, run_cost, order, reinterpret_cast<Run*>(runs)};
  std::vector<Member> all(n);
  for (int64_t i = 0; i < n; i++) all[i] = {static_cast<int32_t>(i), 0};
  if (n) {
    planner.compare(all, 0);
    planner.place(all, 0);
  }
  return planner.n_runs;
}

// Whether every sequence still has the slots of each closed run above it.
int forest_holds(const int32_t* table, int64_t stride, const int64_t* rows, const int32_t* order,
                 const int32_t* runs, int64_t n_runs) {
  for (int64_t i = 0; i < n_runs; i++) {
    const Run& run = reinterpret_cast<const Run*>(runs)[i];
    if (run.end < 0) continue;
    const int32_t* slots = table + run.row * stride + run.begin;
    const size_t bytes = (run.end - run.begin) * sizeof(int32_t);
    for (int32_t s = run.first; s <= run.last; s++)
      if (std::memcmp(slots, table + rows[order[s]] * stride + run.begin, bytes)) return 0;
  }
  return 1;
}

}  // extern "C"
