/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_SKIP_H
#define SNIFFER_SKIP_H

#include <linux/percpu.h>
#include <linux/types.h>

/* Why a packet has no record. */
enum sniffer_skip {
	SNIFFER_SKIP_LISTENER,
	SNIFFER_SKIP_FRAGMENT,
	SNIFFER_SKIP_TRUNCATED,
	SNIFFER_SKIP_OTHER,
	SNIFFER_SKIPS,
};

/* Packets without a record, by cause. Written by their own CPU, in any context. */
DECLARE_PER_CPU(u64 [SNIFFER_SKIPS], sniffer_skips);

/* Count a packet that gets no record. */
static inline void sniffer_skip(enum sniffer_skip why)
{
	this_cpu_inc(sniffer_skips[why]);
}

u64 sniffer_skip_count(int cpu, enum sniffer_skip why);
u64 sniffer_skip_sum(int cpu);

#endif /* SNIFFER_SKIP_H */
