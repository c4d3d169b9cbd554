/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_STREAM_H
#define SNIFFER_STREAM_H

#include <linux/mm_types.h>

#include "netlink.h"
#include "shared_proto.h"

#define SNIFFER_STREAM_PAGES	4
#define SNIFFER_STREAM_ROOM	(16 << 10)	/* bytes in a message of the usual size */

/**
 * struct sniffer_stream - a message that gathers on one CPU; under that CPU's lock
 * @data: the message so far; NULL if there is none
 * @used: bytes written
 * @room: bytes that may be written
 * @count: records, flow records or snaps in it
 * @first: sequence of the first one
 * @batch_seq: of this message, from 0
 * @lost: records that are in no message, because memory was short
 * @pages: pages for messages; each is used again when nobody reads it
 * @page: index of the page that @data is in
 * @next: index of the page that a new one replaces
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
 * sniffer_stream_reserve - make room at the end of a message
 * @stream: with room for them
 * @size: bytes, a multiple of 8
 */
static inline void *sniffer_stream_reserve(struct sniffer_stream *stream, unsigned int size)
{
	void *data = (char *)stream->data + stream->used;

	stream->used += size;
	stream->count++;
	return data;
}

#endif /* SNIFFER_STREAM_H */
