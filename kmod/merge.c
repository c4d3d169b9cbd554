// SPDX-License-Identifier: GPL-2.0-only
/*
 * Flow records. Records that differ only in time, thread, sizes and TCP flags are added
 * up to one, in the message itself. All other fields keep records apart.
 */
#include <linux/bitops.h>
#include <linux/build_bug.h>
#include <linux/compiler.h>
#include <linux/hash.h>
#include <linux/random.h>

#include "merge.h"

#define MERGE_WORDS	(sizeof(struct sniffer_record) / sizeof(u64))

/* Flags that keep records apart. */
static const union {
	struct sniffer_record record;
	u64 words[MERGE_WORDS];
} merge_key = {
	.record = {
		.cookie = U64_MAX, .inode = U64_MAX, .start_ns = U64_MAX,
		.tgid = U32_MAX, .uid = U32_MAX, .creator = U32_MAX,
		.netns = U32_MAX, .ifindex = U32_MAX,
		.sport = U16_MAX, .dport = U16_MAX,
		.family = U8_MAX, .proto = U8_MAX, .dir = U8_MAX, .how = U8_MAX,
		.flags = U16_MAX,
		.saddr = { [0 ... 15] = U8_MAX }, .daddr = { [0 ... 15] = U8_MAX },
		.comm = { [0 ... SNIFFER_COMM_LEN - 1] = -1 },
	},
};

/* Odd. Whoever chooses ports and addresses does not know it. */
static u64 merge_secret[3];

static bool merge_is_same(const struct sniffer_record *one, const struct sniffer_record *other)
{
	const u64 *a = (const u64 *)one, *b = (const u64 *)other;
	u64 differs = 0;
	unsigned int i;

	/* the first word is the time */
#pragma GCC unroll 16
	for (i = 1; i < MERGE_WORDS; i++)
		differs |= (a[i] ^ b[i]) & merge_key.words[i];
	return !differs;
}

static unsigned int merge_slot(const struct sniffer_record *r)
{
	const u64 *from = (const u64 *)r->saddr, *to = (const u64 *)r->daddr;
	u64 ends = (u64)r->sport << 32 | r->dport << 8 | r->dir;
	u64 hash;

	BUILD_BUG_ON(offsetof(struct sniffer_record, saddr) % sizeof(u64));
	BUILD_BUG_ON(SNIFFER_MERGE_MAX > U8_MAX || SNIFFER_MERGE_MAX >= SNIFFER_MERGE_SLOTS);
	hash = (r->cookie ^ from[0] ^ rol64(to[0], 32)) * merge_secret[0];
	hash += (ends ^ from[1]) * merge_secret[1] + (r->tgid ^ to[1]) * merge_secret[2];
	return hash >> 56;
}

/**
 * sniffer_merge_begin - start a message
 * @merge: without one
 * @first: sequence of the record that comes next
 *
 * Return: false when there is no memory.
 */
bool sniffer_merge_begin(struct sniffer_merge *merge, u64 first)
{
	if (!sniffer_stream_begin(&merge->stream, SNIFFER_MERGE_ROOM, first))
		return false;
	memset(merge->slots, 0, sizeof(merge->slots));
	return true;
}

/**
 * sniffer_merge_add - add a record to its flow's sum
 * @merge: with a message that has begun
 * @record: complete
 * @bytes: its bytes on the wire
 * @place: set to the flow record
 *
 * Return: false when it begins a flow and there is no room for another.
 */
bool sniffer_merge_add(struct sniffer_merge *merge, const struct sniffer_record *record,
		       u32 bytes, struct sniffer_merge_place *place)
{
	struct sniffer_flow_record *flows = merge->stream.data, *flow;
	const u64 message = merge->stream.batch_seq + 1;
	unsigned int slot = merge_slot(record);

	for (; merge->slots[slot]; slot = (slot + 1) % SNIFFER_MERGE_SLOTS) {
		flow = &flows[merge->slots[slot] - 1];
		/* nearly always the first slot: nothing is prepared for more */
		OPTIMIZER_HIDE_VAR(record);
		if (merge_is_same(&flow->last, record) &&
		    likely(sniffer_merge_has_room(flow, record, bytes))) {
			place->message = message;
			place->number = merge->slots[slot] - 1;
			sniffer_merge_into(flow, record, bytes);
			return true;
		}
	}
	if (merge->stream.used == merge->stream.room)
		return false;
	flow = sniffer_stream_reserve(&merge->stream, sizeof(*flow));
	flow->last = *record;
	flow->last.len = bytes;
	flow->last.hdr_len = 0;
	flow->first_ns = record->time_ns;
	flow->records = 1;
	flow->reserved = 0;
	place->message = message;
	place->number = merge->stream.count - 1;
	merge->slots[slot] = merge->stream.count;
	return true;
}

/**
 * sniffer_merge_init - choose the key of the hash, once for each load
 */
void sniffer_merge_init(void)
{
	unsigned int i;

	get_random_bytes(merge_secret, sizeof(merge_secret));
	for (i = 0; i < ARRAY_SIZE(merge_secret); i++)
		merge_secret[i] |= 1;
}
