// SPDX-License-Identifier: GPL-2.0-only
/*
 * A message that is being written. It is written in pages, and Netlink sends these
 * pages without a copy. A page is used again when every reader has copied it. This
 * saves an allocation for each message; many kernels also zero new memory.
 */
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/skbuff.h>

#include "stream.h"

/* Finds a page with room for @room bytes that nobody reads: one of ours, or a new one. */
static bool stream_take_page(struct sniffer_stream *stream, unsigned int room)
{
	struct page *page;
	unsigned int i;

	for (i = 0; i < SNIFFER_STREAM_PAGES; i++) {
		page = stream->pages[i];
		if (page && page_ref_count(page) == 1 && page_size(page) >= room) {
			stream->page = i;
			return true;
		}
	}
	page = alloc_pages(GFP_ATOMIC | __GFP_COMP | __GFP_NOWARN, get_order(room));
	if (!page)
		return false;
	stream->page = stream->next;
	stream->next = (stream->next + 1) % SNIFFER_STREAM_PAGES;
	if (stream->pages[stream->page])
		put_page(stream->pages[stream->page]);
	stream->pages[stream->page] = page;
	return true;
}

/**
 * sniffer_stream_begin - start a message
 * @stream: has no message
 * @room: bytes that may be written
 * @first: sequence of its first record
 *
 * Return: false when there is no memory.
 */
bool sniffer_stream_begin(struct sniffer_stream *stream, unsigned int room, u64 first)
{
	if (!stream_take_page(stream, room))
		return false;
	stream->data = page_address(stream->pages[stream->page]);
	stream->room = room;
	stream->used = 0;
	stream->count = 0;
	stream->first = first;
	return true;
}

/**
 * sniffer_stream_send - multicast a message
 * @stream: has a message, and afterwards none
 * @group: to whom
 * @head: its head, before the records
 * @size: of @head, a multiple of 8
 *
 * Return: 0, -ENOMEM, or another error if no member got it.
 */
int sniffer_stream_send(struct sniffer_stream *stream, enum sniffer_group group,
			const void *head, size_t size)
{
	struct page *page = stream->pages[stream->page];
	/* a reader is charged for the whole page; so copy a message that is half empty */
	bool small = stream->used * 2 < page_size(page);
	struct sk_buff *skb;

	skb = sniffer_netlink_begin(group, size + (small ? stream->used : 0));
	stream->data = NULL;
	stream->batch_seq++;
	if (!skb)
		return -ENOMEM;
	skb_put_data(skb, head, size);
	if (small) {
		skb_put_data(skb, page_address(page), stream->used);
	} else {
		get_page(page);
		skb_add_rx_frag(skb, 0, page, 0, stream->used, page_size(page));
	}
	return sniffer_netlink_send(skb, group);
}

/**
 * sniffer_stream_free - free the pages
 * @stream: not used any more
 */
void sniffer_stream_free(struct sniffer_stream *stream)
{
	unsigned int i;

	for (i = 0; i < SNIFFER_STREAM_PAGES; i++)
		if (stream->pages[i])
			put_page(stream->pages[i]);
}
