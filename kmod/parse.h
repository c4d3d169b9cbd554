/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_PARSE_H
#define SNIFFER_PARSE_H

#include <linux/kernel.h>
#include <linux/skbuff.h>

#include "lookup.h"

bool sniffer_parse(struct sniffer_flow *flow);

/* Fills in len and gso_segs; @r->hdr_len is known. */
static __always_inline void sniffer_parse_sizes(struct sniffer_record *r, const struct sk_buff *skb)
{
	r->len = skb->len;
	r->gso_segs = 1;
	if (skb_is_gso(skb)) {
		r->gso_segs = skb_shinfo(skb)->gso_segs;
		if (!r->gso_segs)
			r->gso_segs = max_t(int, 1, DIV_ROUND_UP((int)(skb->len - r->hdr_len),
								 skb_shinfo(skb)->gso_size));
	}
}

#endif /* SNIFFER_PARSE_H */
