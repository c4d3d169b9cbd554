/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_BATCH_H
#define SNIFFER_BATCH_H

#include <linux/bits.h>
#include <linux/jiffies.h>
#include <linux/percpu.h>
#include <linux/skbuff.h>

#include "netlink.h"
#include "shared_proto.h"

struct sniffer_merge_place;

/**
 * struct sniffer_wanted - which groups had listeners
 * @asked: jiffies of the last update; there is one in each jiffy with records, and at a
 *	flush
 * @groups: bit mask of enum sniffer_group
 */
struct sniffer_wanted {
	unsigned long asked;
	unsigned int groups;
};

/* Written by its own CPU, bottom halves off. */
DECLARE_PER_CPU(struct sniffer_wanted, sniffer_wanted);

void sniffer_batch_ask(void);

/**
 * sniffer_batch_was_wanted - did anybody want records at the last update?
 *
 * Any context.
 */
static inline bool sniffer_batch_was_wanted(void)
{
	return this_cpu_read(sniffer_wanted.groups) &
	       (BIT(SNIFFER_GROUP_INDEX_PACKETS) | BIT(SNIFFER_GROUP_INDEX_FLOWS));
}

/**
 * sniffer_batch_wanted - does anybody want records, single ones or sums?
 *
 * Call it where bottom halves may be switched off and on.
 */
static inline bool sniffer_batch_wanted(void)
{
	if (unlikely(this_cpu_read(sniffer_wanted.asked) != jiffies))
		sniffer_batch_ask();
	return sniffer_batch_was_wanted();
}

void sniffer_batch_add(struct sniffer_record *record, const struct sk_buff *skb,
		       struct sniffer_merge_place *place);
unsigned int sniffer_batch_flush(struct sniffer_tail *tails, struct sniffer_flow_tail *flows,
				 unsigned int max);
void sniffer_batch_counters(struct sniffer_counters *sum);
u64 sniffer_batch_instance(void);
int sniffer_batch_init(void);
void sniffer_batch_stop(void);
void sniffer_batch_exit(void);

#endif /* SNIFFER_BATCH_H */
