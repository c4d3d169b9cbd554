/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_MERGE_H
#define SNIFFER_MERGE_H

#include "stream.h"

/* Flow records a message: what 16 KiB have room for, and a slot can number. */
#define SNIFFER_MERGE_MAX	(SNIFFER_STREAM_ROOM / sizeof(struct sniffer_flow_record))
#define SNIFFER_MERGE_ROOM	(SNIFFER_MERGE_MAX * sizeof(struct sniffer_flow_record))
#define SNIFFER_MERGE_SLOTS	256

/**
 * struct sniffer_merge - the flow records that gather on one CPU; under that CPU's lock
 * @stream: the message that they are written in
 * @slots: by hash: the number of a flow record in it from 1 on, 0 for none
 */
struct sniffer_merge {
	struct sniffer_stream stream;
	u8 slots[SNIFFER_MERGE_SLOTS];
};

bool sniffer_merge_begin(struct sniffer_merge *merge, u64 first);
bool sniffer_merge_add(struct sniffer_merge *merge, const struct sniffer_record *record,
		       u32 bytes);
void sniffer_merge_init(void);

#endif /* SNIFFER_MERGE_H */
