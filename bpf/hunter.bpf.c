// SPDX-License-Identifier: GPL-2.0-only
/* The programs of engine `ebpf`: one object for every kernel from 6.1 on. */
#include "probes.h"
#include "collect.h"
#include "out.h"
#ifdef HUNTER_PARTS
#include "parts.h"
#endif

char LICENSE[] SEC("license") = "GPL";
