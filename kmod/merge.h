/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_MERGE_H
#define SNIFFER_MERGE_H

#include <linux/compiler.h>
#include <linux/minmax.h>

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

/**
 * struct sniffer_merge_place - where a record was summed up
 * @message: which one, from 1 on; 0: nowhere
 * @number: of the flow record in it, from 0 on
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

	/* a packet that interrupts another's naming overtakes it */
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
 * sniffer_merge_again - sum a record up where one like it was
 * @merge: with a message that has begun
 * @record: what happened, whole
 * @bytes: it stands for on the wire
 * @place: from sniffer_merge_add() of one that was the same but for time, thread, sizes
 *	and TCP flags; or nowhere
 *
 * Return: false when that is not in this message, or has no room.
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
