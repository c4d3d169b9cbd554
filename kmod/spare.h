/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_SPARE_H
#define SNIFFER_SPARE_H

#include <linux/types.h>

struct sniffer_owner;

struct sniffer_owner *sniffer_spare_take(void);
void sniffer_spare_put(struct sniffer_owner *owner);
void sniffer_spare_put_later(struct sniffer_owner *owner);
bool sniffer_spare_init(void);
void sniffer_spare_exit(void);

#endif /* SNIFFER_SPARE_H */
