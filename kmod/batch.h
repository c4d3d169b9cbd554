/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_BATCH_H
#define SNIFFER_BATCH_H

#include <linux/skbuff.h>

#include "shared_proto.h"

/* Why a packet has no record. */
enum sniffer_skip {
	SNIFFER_SKIP_LISTENER,
	SNIFFER_SKIP_FRAGMENT,
	SNIFFER_SKIP_TRUNCATED,
	SNIFFER_SKIP_OTHER,
	SNIFFER_SKIPS,
};

void sniffer_batch_skip(enum sniffer_skip why);
void sniffer_batch_add(struct sniffer_record *record);
void sniffer_batch_snap(const struct sniffer_record *record, const struct sk_buff *skb);
unsigned int sniffer_batch_flush(struct sniffer_tail *tails, unsigned int max);
void sniffer_batch_counters(struct sniffer_counters *sum);
unsigned int sniffer_batch_size(void);
unsigned int sniffer_batch_flush_ms(void);
void sniffer_batch_configure(unsigned int size, unsigned int flush_ms);
u64 sniffer_batch_instance(void);
int sniffer_batch_init(void);
void sniffer_batch_stop(void);
void sniffer_batch_exit(void);

#endif /* SNIFFER_BATCH_H */
