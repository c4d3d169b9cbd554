/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_COMM_H
#define SNIFFER_COMM_H

#include <linux/string.h>
#include <linux/types.h>
#include <asm/word-at-a-time.h>

#include "shared_proto.h"

/*
 * A task's comm may have bytes of earlier names behind its NUL. They must not reach the
 * wire. Two words at a time, because each sent packet has a comm.
 */
static inline void sniffer_comm_copy(char *to, const char *comm)
{
	const struct word_at_a_time constants = WORD_AT_A_TIME_CONSTANTS;
	unsigned long words[SNIFFER_COMM_LEN / sizeof(long)], zeros;
	bool ended = false;
	unsigned int i;

	memcpy(words, comm, sizeof(words));
	for (i = 0; i < ARRAY_SIZE(words); i++) {
		if (ended) {
			words[i] = 0;
		} else if (has_zero(words[i], &zeros, &constants)) {
			zeros = prep_zero_mask(words[i], zeros, &constants);
			words[i] &= zero_bytemask(create_zero_mask(zeros));
			ended = true;
		}
	}
	memcpy(to, words, sizeof(words));
}

#endif /* SNIFFER_COMM_H */
