/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_STREAM_H
#define SNIFFER_STREAM_H

#include <linux/mm_types.h>

#include "netlink.h"
#include "shared_proto.h"

#define SNIFFER_STREAM_PAGES	4
#define SNIFFER_STREAM_ROOM	(16 << 10)	/* bytes of a message of usual size */

/**
 * struct sniffer_stream - a message that gathers on one CPU; under that CPU's lock
 * @data: what is in the message so far, NULL when nothing waits
 * @used: bytes of it
 * @room: bytes that it may grow to
 * @count: records, flow records or snaps in it
 * @first: sequence of the first one
 * @batch_seq: of this message, from 0
 * @lost: records that got into no message, for want of memory
 * @pages: where messages were written, to be written again once nobody reads them
 * @page: which of these @data is
 * @next: which gives way to a new one
 */
struct sniffer_stream {
	void *data;
	unsigned int used;
	unsigned int room;
	unsigned int count;
	u64 first;
	u64 batch_seq;
	u64 lost;
	struct page *pages[SNIFFER_STREAM_PAGES];
	unsigned int page;
	unsigned int next;
};

bool sniffer_stream_begin(struct sniffer_stream *stream, unsigned int room, u64 first);
int sniffer_stream_send(struct sniffer_stream *stream, enum sniffer_group group,
			const void *head, size_t size);
void sniffer_stream_free(struct sniffer_stream *stream);

/**
 * sniffer_stream_reserve - bytes to be written at the end of a message that has begun
 * @stream: with room for them
 * @size: how many, a multiple of 8
 */
static inline void *sniffer_stream_reserve(struct sniffer_stream *stream, unsigned int size)
{
	void *data = (char *)stream->data + stream->used;

	stream->used += size;
	stream->count++;
	return data;
}

#endif /* SNIFFER_STREAM_H */
