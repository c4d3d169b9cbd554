/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_SPARE_H
#define SNIFFER_SPARE_H

#include <linux/types.h>

/**
 * struct sniffer_spare - part of an entry, used when it is given back
 * @rcu: readers that found it in the table may read it until the end of a grace period
 * @next: next in its CPU's list
 */
struct sniffer_spare {
	struct rcu_head rcu;
	struct sniffer_spare *next;
};

void *sniffer_spare_take(void);
void sniffer_spare_put(struct sniffer_spare *spare);
void sniffer_spare_put_later(struct sniffer_spare *spare);
bool sniffer_spare_init(size_t size, size_t offset);
void sniffer_spare_exit(void);

#endif /* SNIFFER_SPARE_H */
