/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_MERGE_H
#define SNIFFER_MERGE_H

#include <linux/compiler.h>
#include <linux/minmax.h>

#include "stream.h"

/* The most flow records in a message: they fit into 16 KiB, and a slot can number them. */
#define SNIFFER_MERGE_MAX	(SNIFFER_STREAM_ROOM / sizeof(struct sniffer_flow_record))
#define SNIFFER_MERGE_ROOM	(SNIFFER_MERGE_MAX * sizeof(struct sniffer_flow_record))
#define SNIFFER_MERGE_SLOTS	256

/**
 * struct sniffer_merge - the flow records that gather on one CPU; under that CPU's lock
 * @stream: the message that they are written in
 * @slots: by hash: number of a flow record in the message, from 1; 0: none
 */
struct sniffer_merge {
	struct sniffer_stream stream;
	u8 slots[SNIFFER_MERGE_SLOTS];
};

/**
 * struct sniffer_merge_place - where a record was added up
 * @message: number of the message, from 1; 0: nowhere
 * @number: number of the flow record in it, from 0
 */
struct sniffer_merge_place {
	u64 message;
	unsigned int number;
};

bool sniffer_merge_begin(struct sniffer_merge *merge, u64 first);
bool sniffer_merge_add(struct sniffer_merge *merge, const struct sniffer_record *record,
		       u32 bytes, struct sniffer_merge_place *place);
void sniffer_merge_init(void);

static __always_inline bool sniffer_merge_has_room(const struct sniffer_flow_record *flow,
						   const struct sniffer_record *record, u32 bytes)
{
	return flow->last.len + bytes >= bytes &&
	       flow->last.gso_segs + record->gso_segs <= U16_MAX;
}

static __always_inline void sniffer_merge_into(struct sniffer_flow_record *flow, const struct sniffer_record *record, u32 bytes)
{
	struct sniffer_record *last = &flow->last;

	/* a packet that interrupts the naming of another one is recorded first */
	if (likely(record->time_ns >= last->time_ns)) {
		last->time_ns = record->time_ns;
		last->tid = record->tid;
		last->seq = record->seq;
	} else {
		flow->first_ns = min(flow->first_ns, record->time_ns);
	}
	last->len += bytes;
	last->gso_segs += record->gso_segs;
	last->tcp_flags |= record->tcp_flags;
	flow->records++;
}

/**
 * sniffer_merge_again - add a record where an earlier record of its flow was added
 * @merge: with a message that has begun
 * @record: complete
 * @bytes: its bytes on the wire
 * @place: from sniffer_merge_add() of a record that differs only in time, thread, sizes
 *	and TCP flags; or nowhere
 *
 * Return: false when @place is not in this message, or has no room.
 */
static __always_inline bool sniffer_merge_again(struct sniffer_merge *merge,
						const struct sniffer_record *record, u32 bytes,
						const struct sniffer_merge_place *place)
{
	struct sniffer_flow_record *flow = merge->stream.data;

	if (unlikely(place->message != merge->stream.batch_seq + 1))
		return false;
	flow += place->number;
	if (unlikely(!sniffer_merge_has_room(flow, record, bytes)))
		return false;
	sniffer_merge_into(flow, record, bytes);
	return true;
}

#endif /* SNIFFER_MERGE_H */
