// SPDX-License-Identifier: GPL-2.0-only
/* Counts packets that get no record. */
#include "skip.h"

DEFINE_PER_CPU(u64 [SNIFFER_SKIPS], sniffer_skips);

/**
 * sniffer_skip_count - how many packets a CPU has skipped for one cause
 * @cpu: the CPU
 * @why: the cause
 */
u64 sniffer_skip_count(int cpu, enum sniffer_skip why)
{
	return per_cpu(sniffer_skips, cpu)[why];
}

/**
 * sniffer_skip_sum - how many packets a CPU has skipped
 * @cpu: the CPU
 */
u64 sniffer_skip_sum(int cpu)
{
	u64 sum = 0;
	int i;

	for (i = 0; i < SNIFFER_SKIPS; i++)
		sum += per_cpu(sniffer_skips, cpu)[i];
	return sum;
}
