// SPDX-License-Identifier: GPL-2.0-only
/* Engine `ebpf`: the programs, in one object for every kernel from 6.1 on. */
#include "probes.h"
#include "collect.h"
#include "out.h"
#ifdef HUNTER_PARTS
#include "parts.h"
#endif

char LICENSE[] SEC("license") = "GPL";
