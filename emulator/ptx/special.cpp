// Special registers: their names, and what they hold.
#include "machine.h"

namespace ptx {

namespace {

const std::map<std::string, Special> kSpecials{
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%cluster_ctarank", Special::cluster_ctarank},
    {"%cluster_nctarank", Special::cluster_nctarank},
    {"%cluster_ctaid.x", Special::cluster_ctaid_x},
    {"%cluster_nctaid.x", Special::cluster_nctaid_x},
    {"%clusterid.x", Special::clusterid_x},
    {"%nclusterid.x", Special::nclusterid_x},
    {"%clock", Special::clock},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%lanemask_gt", Special::lanemask_gt},
};

}  // namespace

std::optional<Special> special_of(const std::string& name) {
  const auto found = kSpecials.find(name);
  if (found == kSpecials.end()) return std::nullopt;
  return found->second;
}

uint32_t special(Special which, const Launch& launch, const Block& block, int warp, int lane) {
  const int thread = warp * kLanes + lane;
  const auto& b = launch.block;
  const auto& g = launch.grid;
  const auto& c = launch.cluster;
  const Lanes bit = Lanes{1} << lane;
  switch (which) {
    case Special::tid_x:
      return thread % b[0];
    case Special::tid_y:
      return thread / b[0] % b[1];
    case Special::tid_z:
      return thread / b[0] / b[1];
    case Special::ntid_x:
      return b[0];
    case Special::ntid_y:
      return b[1];
    case Special::ntid_z:
      return b[2];
    case Special::ctaid_x:
      return block.id[0];
    case Special::ctaid_y:
      return block.id[1];
    case Special::ctaid_z:
      return block.id[2];
    case Special::nctaid_x:
      return g[0];
    case Special::nctaid_y:
      return g[1];
    case Special::nctaid_z:
      return g[2];
    case Special::laneid:
      return lane;
    case Special::warpid:
      return warp;
    case Special::cluster_ctarank:
      return block.rank;
    case Special::cluster_nctarank:
      return c[0] * c[1] * c[2];
    case Special::cluster_ctaid_x:
      return block.id[0] % c[0];
    case Special::cluster_nctaid_x:
      return c[0];
    case Special::clusterid_x:
      return block.id[0] / c[0];
    case Special::nclusterid_x:
      return g[0] / c[0];
    case Special::clock:
      return 0;
    case Special::lanemask_lt:
      return bit - 1;
    case Special::lanemask_le:
      return bit | (bit - 1);
    case Special::lanemask_eq:
      return bit;
    case Special::lanemask_ge:
      return ~(bit - 1);
    case Special::lanemask_gt:
      return ~(bit | (bit - 1));
  }
  return 0;
}

}  // namespace ptx
